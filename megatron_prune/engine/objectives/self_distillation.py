"""Gates that learn from the model without gates: no second model, one more forward pass.

    loss = cross entropy + W x KL(without gates || with gates)

Huang et al. 2026, arXiv:2603.08065, with W = 2. The teacher is the model itself, its weights
frozen and its gates left out, so that it costs no memory but its logits (see `distillation`), and
one more forward pass where a step has a forward pass and a backward one without weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from megatron_prune.engine.forward.microbatches import Microbatch
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.distill_options import DistillOptions
from megatron_prune.engine.objectives.distillation import Distillation
from megatron_prune.engine.objectives.divergence import Softening


class SelfDistillation(Distillation):
    """The losses of a model with gates beside itself without; an `Objective`.

    Attributes:
        without_gates: what a forward pass of the teacher happens in; the gates' owner sets it.
    """

    without_gates: Callable[[], AbstractContextManager[None]]

    def __init__(self, weight: float, run: ModelOptions, groups: Groups) -> None:
        super().__init__(DistillOptions(), run, groups, (), 0)
        # the loss of `distillation_losses` is a mean of both parts: 1 + W times it is their sum
        self._total, self._how = 1 + weight, Softening(lm_weight=1 / (1 + weight))

        self._is_teaching = False

    def attach(self, model: LanguageModel) -> None:
        self.teachers = [model]
        self._vocab_size, model.criterion = model.true_vocab_size, self._criterion

    @contextmanager
    def _taught_by(self) -> Iterator[None]:
        with self.without_gates():
            self._is_teaching = True
            try:
                yield
            finally:
                self._is_teaching = False

    def _criterion(self, logits_sbV: Tensor, labels_sb: Tensor) -> Tensor:
        of = self._capture if self._is_teaching else self._compare
        return of(logits_sbV, labels_sb)

    def loss(self, losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        mean, told = super().loss(losses_bs, batch)
        return mean * self._total, told
