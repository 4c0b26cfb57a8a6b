"""Learning from teachers: their forward passes beside the student's, and the loss of both.

With one pipeline stage a teacher sees a microbatch just before the student does, so that the logits
of one microbatch are held. With more, the teachers run through the whole pipeline for all
microbatches of a step first, and the last stage keeps their logits: [s, b, V / TP] a microbatch and
teacher, in the run's dtype, until the student has used them. Neither the order of the samples nor a
random number depends on there being a teacher. Validation is the student's alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.engine.forward.loss import token_losses
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.distill_options import DistillOptions
from megatron_prune.engine.objectives.divergence import distillation_losses
from megatron_prune.engine.objectives.hidden_loss import HiddenLoss
from megatron_prune.engine.objectives.teachers import load_teacher
from megatron_prune.engine.train.corpora import Microbatch
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size
from megatron_prune.sources.source import DTYPES, Source


def kept_logits_bytes(
    dtype: str, vocab_size: int, grid: ParallelGrid, tokens: int, microbatches: int
) -> int:
    """What the last stage keeps of one teacher's logits in one step; ``tokens`` a microbatch."""
    held = microbatches if grid.pipeline_parallel > 1 else 1
    columns = padded_vocab_size(vocab_size, grid.tensor_parallel) // grid.tensor_parallel
    return held * tokens * columns * DTYPES[dtype].itemsize


class Distillation:
    """The teachers of a run, the losses of the microbatch under way, and what was not yet logged.

    Attributes:
        names: of the losses beside the language-model loss, as they are logged.
        shares: of the step, this rank's; those of all ranks sum to the mean.
    """

    def __init__(
        self,
        options: DistillOptions,
        run: ModelOptions,
        groups: Groups,
        sources: Sequence[Source],
        student: LanguageModel,
        seed: int,
    ) -> None:
        self.options, self._groups, self._student = options, groups, student
        self.teachers = [load_teacher(source, groups, run) for source in sources]
        for teacher in self.teachers:
            teacher.criterion = self._capture
        student.criterion = self._compare
        self._hidden: HiddenLoss | None = None
        self._projected: list[list[int]] = []
        if options.hidden_layers:
            self._hidden = HiddenLoss(
                options.hidden_layers, student, self.teachers[0], groups, seed
            )
            if self._hidden.is_projected:
                self._projected = [list(pair) for pair in options.hidden_layers]
        self.names = ("kl loss", "hidden loss") if self._hidden else ("kl loss",)
        self.shares = (0.0,) * len(self.names)
        self._logged: list[list[float]] = []
        self._captured: list[Tensor] = []
        self._taught: list[Tensor] = []
        self._parts: tuple[Tensor, Tensor] | None = None

    # ---- the teachers ------------------------------------------------------------------------

    def _capture(self, logits_sbV: Tensor, labels_sb: Tensor) -> Tensor:
        self._captured.append(logits_sbV)
        return torch.zeros(labels_sb.shape, device=logits_sbV.device)

    def beside(
        self, data: Iterator[Microbatch], count: int, rows: int
    ) -> Iterator[tuple[Any, ...]]:
        """The microbatches, each with what the teachers make of it, which the last stage has.

        Args:
            count, rows: microbatches of the step, samples of each.
        """
        if self._groups.grid.pipeline_parallel == 1:
            return self._one_by_one(data)
        inside = not (self._groups.is_first_stage or self._groups.is_last_stage)
        batches = [] if inside else list(data)
        logits = [self._through_pipeline(one, batches, count, rows) for one in self.teachers]
        # popped, so that the logits go when the student has used them
        return ((*batch, [found.pop(0) for found in logits if found]) for batch in batches)

    def _one_by_one(self, data: Iterator[Microbatch]) -> Iterator[tuple[Any, ...]]:
        for batch in data:
            with torch.no_grad():
                for teacher in self.teachers:
                    teacher(batch.tokens, None, None, labels=batch.labels)
            found, self._captured = self._captured, []
            yield *batch, found

    def _through_pipeline(
        self, teacher: LanguageModel, batches: Sequence[Microbatch], count: int, rows: int
    ) -> list[Tensor]:
        """The last stage's logits of every microbatch, in order; nothing on other stages."""

        def forward(data: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
            groups = self._groups
            if not (groups.is_first_stage or groups.is_last_stage):
                return model(None, None, None), None
            batch = next(data)
            losses = model(batch.tokens, None, None, labels=batch.labels)
            return losses, lambda zeros: (zeros.sum(), {})

        with torch.no_grad():
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter(batches),
                model=teacher,
                num_microbatches=count,
                seq_length=teacher.max_sequence_length,
                micro_batch_size=rows,
                forward_only=True,
            )
        found, self._captured = self._captured, []
        return found

    # ---- the losses --------------------------------------------------------------------------

    def teach(self, taught: list[Tensor]) -> None:
        """What the student's next forward pass is compared with; nothing for validation."""
        self._taught = taught

    def _compare(self, logits_sbV: Tensor, labels_sb: Tensor) -> Tensor:
        vocabulary, group = self._student.true_vocab_size, self._groups.tp_group
        taught, self._taught = self._taught, []
        if not taught:
            return token_losses(logits_sbV, labels_sb, vocab_size=vocabulary, group=group)
        how = self.options.softening
        loss, lm, kl = distillation_losses(
            logits_sbV, taught, labels_sb, vocab_size=vocabulary, how=how, group=group
        )
        self._parts = lm, kl
        return loss

    def loss(
        self, mean: Tensor, mask_bs: Tensor, counted: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the microbatch just seen, of which ``mean`` is the logits'; and its parts.

        All are this context-parallel rank's share: sums over its tokens, divided by ``counted``.
        """
        assert self._parts is not None, "no forward pass with a teacher came before"
        lm, kl = ((part_sb.detach().t() * mask_bs).sum() / counted for part_sb in self._parts)
        self._parts = None
        told = {"lm loss": lm, "kl loss": kl}
        if self._hidden is not None:
            mine, told["hidden loss"] = self._hidden.take(mask_bs, counted)
            mean = mean + self.options.distill_hidden_weight * mine
        return mean, told

    # ---- telling -----------------------------------------------------------------------------

    def keep_shares(self, found: Sequence[Mapping[str, Tensor]], shares: float) -> None:
        """Of a step's microbatches; ``shares`` is what a sum over them is divided by."""
        self.shares = tuple(sum(float(one[n]) for one in found) / shares for n in self.names)

    def advance(self, values: Sequence[float]) -> str | None:
        """One more step is done; its losses, in the order of ``names``.

        Returns:
            Which of them is not a number; that step is not counted.
        """
        for name, value in zip(self.names, values):
            if not math.isfinite(value):
                return f"{name} is {value}"
        self._logged.append(list(values))
        return None

    def take_means(self) -> dict[str, float]:
        """Means since the last logged iteration."""
        steps, self._logged = self._logged, []
        return {name: sum(all) / len(all) for name, all in zip(self.names, zip(*steps))}

    def state(self) -> dict[str, Any]:
        """What a run that continues needs; plain types only."""
        return {
            "taught losses": [list(step) for step in self._logged],
            "projections": self._projected,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        steps = state.get("taught losses", [])
        self._logged = [list(step) for step in steps if len(step) == len(self.names)]
