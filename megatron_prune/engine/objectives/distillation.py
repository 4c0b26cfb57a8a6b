"""Learning from teachers: their forward passes beside the student's, and the loss of both.

With one pipeline stage a teacher sees a microbatch just before the student does, so that the logits
of one microbatch are held. With more, the teachers run through the whole pipeline for all
microbatches of a step first, and the last stage keeps their logits: [s, b, V / TP] a microbatch and
teacher, in the run's dtype, until the student has used them. Neither the order of the samples nor a
random number depends on there being a teacher. Validation is the student's alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megatron_prune.engine.forward.loss import token_losses
from megatron_prune.engine.forward.microbatches import (
    Microbatch,
    Step,
    forward_backward,
    lm_loss,
)
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.distill_options import DistillOptions
from megatron_prune.engine.objectives.divergence import distillation_losses
from megatron_prune.engine.objectives.hidden_loss import HiddenLoss
from megatron_prune.engine.objectives.objective import LM_LOSS, LanguageModelLoss
from megatron_prune.engine.objectives.teachers import load_teacher
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size
from megatron_prune.model.tensors import torch_dtype
from megatron_prune.sources.source import Source


def kept_logits_bytes(
    dtype: str, vocab_size: int, grid: ParallelGrid, tokens: int, microbatches: int
) -> int:
    """What the last stage keeps of one teacher's logits in one step; ``tokens`` a microbatch."""
    held = microbatches if grid.pipeline_parallel > 1 else 1
    columns = padded_vocab_size(vocab_size, grid.tensor_parallel) // grid.tensor_parallel
    return held * tokens * columns * torch_dtype(dtype).itemsize


class Distillation(LanguageModelLoss):
    """The teachers of a run and the losses of the microbatch under way; an `Objective`."""

    def __init__(
        self,
        options: DistillOptions,
        run: ModelOptions,
        groups: Groups,
        sources: Sequence[Source],
        seed: int,
    ) -> None:
        self.options, self._run, self._groups, self._seed = options, run, groups, seed
        self._sources, self._how = sources, options.softening
        self.names = ("kl loss", "hidden loss") if options.hidden_layers else ("kl loss",)
        self._hidden: HiddenLoss | None = None
        self._captured: list[Tensor] = []
        self._taught: list[Tensor] = []
        self._parts: tuple[Tensor, Tensor] | None = None

    def attach(self, model: LanguageModel) -> None:
        """Load the teachers, and look at the student's logits and hidden states."""
        groups, pairs = self._groups, self.options.hidden_layers
        self.teachers = [load_teacher(source, groups, self._run) for source in self._sources]
        for teacher in self.teachers:
            teacher.criterion = self._capture
        self._vocab_size, model.criterion = model.true_vocab_size, self._compare
        if pairs:
            self._hidden = HiddenLoss(pairs, model, self.teachers[0], groups, self._seed)

    # ---- the teachers ------------------------------------------------------------------------

    def _taught_by(self) -> AbstractContextManager[None]:
        """What the teachers' forward passes happen in."""
        return nullcontext()

    def _capture(self, logits_sbV: Tensor, labels_sb: Tensor) -> Tensor:
        self._captured.append(logits_sbV)
        return torch.zeros(labels_sb.shape, device=logits_sbV.device)

    def beside(self, batches: Iterator[Microbatch], step: Step) -> Iterator[Microbatch]:
        """The microbatches; before the last stage's student sees one, the teachers have."""
        if self._groups.grid.pipeline_parallel == 1:
            return self._one_by_one(batches)
        inside = not (self._groups.is_first_stage or self._groups.is_last_stage)
        held = [] if inside else list(batches)
        return self._in_turn(held, [self._logits(one, held, step) for one in self.teachers])

    def _one_by_one(self, batches: Iterator[Microbatch]) -> Iterator[Microbatch]:
        for batch in batches:
            with torch.no_grad(), self._taught_by():
                for teacher in self.teachers:
                    teacher(batch.tokens, None, None, labels=batch.labels)
            self._taught, self._captured = self._captured, []
            yield batch

    def _in_turn(
        self, batches: Sequence[Microbatch], logits: Sequence[list[Tensor]]
    ) -> Iterator[Microbatch]:
        for batch in batches:
            # popped, so that the logits go when the student has used them
            self._taught = [found.pop(0) for found in logits if found]
            yield batch

    @torch.no_grad()
    def _logits(
        self, teacher: LanguageModel, batches: Sequence[Microbatch], step: Step
    ) -> list[Tensor]:
        """The last stage's logits of every microbatch, in order; nothing on other stages."""
        groups = self._groups
        with self._taught_by():
            forward_backward(teacher, iter(batches), step, groups, _nothing, forward_only=True)
        found, self._captured = self._captured, []
        return found

    # ---- the losses --------------------------------------------------------------------------

    def _compare(self, logits_sbV: Tensor, labels_sb: Tensor) -> Tensor:
        vocabulary, group = self._vocab_size, self._groups.tp_group
        taught, self._taught = self._taught, []
        if not taught:
            return token_losses(logits_sbV, labels_sb, vocab_size=vocabulary, group=group)
        loss, lm, kl = distillation_losses(
            logits_sbV, taught, labels_sb, vocab_size=vocabulary, how=self._how, group=group
        )
        self._parts = lm, kl
        return loss

    def loss(self, losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the microbatch just seen, and its parts."""
        assert self._parts is not None, "no forward pass with a teacher came before"
        mean, _ = lm_loss(losses_bs, batch)
        parts = [(one_sb.detach().t() * batch.mask).sum() / batch.counted for one_sb in self._parts]
        self._parts = None
        told = dict(zip((LM_LOSS, "kl loss"), parts))
        if self._hidden is not None:
            mine, told["hidden loss"] = self._hidden.take(batch.mask, batch.counted)
            mean = mean + self.options.distill_hidden_weight * mine
        return mean, told

    def state(self) -> dict[str, Any]:
        """Which layers have projections: a run that continues must have the same."""
        has_projections = self._hidden is not None and self._hidden.is_projected
        pairs = self.options.hidden_layers if has_projections else ()
        return {"projections": [list(pair) for pair in pairs]}


def _nothing(zeros_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
    return zeros_bs.sum(), {}
