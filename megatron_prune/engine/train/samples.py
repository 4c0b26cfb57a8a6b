"""What a training run learns from and is measured on, as the loop sees it; and a blend of corpora.

The other kind of samples is `domains.DomainLoading`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from megatron_prune.data.sidecar import CorpusFacts
from megatron_prune.engine.forward.microbatches import (
    Step,
    forward_backward,
    lm_loss,
    microbatches,
)
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.objective import LM_LOSS
from megatron_prune.engine.train.corpora import build_datasets
from megatron_prune.engine.train.metrics import MetricsLog
from megatron_prune.engine.train.options import TrainOptions


def step_of(options: TrainOptions, groups: Groups, iteration: int, samples: int) -> Step:
    """A step of so many samples, spread over the copies of the model."""
    rows = options.micro_batch_size
    count = samples // (rows * groups.data_parallel)
    return Step(iteration=iteration, count=count, rows=rows, length=options.seq_length)


class Samples(Protocol):
    """A guest of the training loop; its methods are called on all ranks alike.

    Attributes:
        train: [n] is the n-th sample of the run.
    """

    train: Any

    def is_due(self, iteration: int) -> bool:
        """Whether a validation follows this step, whatever the interval says."""
        ...

    def validate(
        self, model: LanguageModel, log: MetricsLog, iteration: int, consumed: int
    ) -> float:
        """Measure, draw what follows from it, tell what is told of its own; the loss."""
        ...

    def loss(self, model: LanguageModel) -> float:
        """What `validate` returns, and nothing else of it."""
        ...

    def tell(self, log: MetricsLog, consumed: int) -> None:
        """Say what a step has changed about the samples."""
        ...

    def state(self, consumed: int) -> dict[str, Any]:
        """Its keys in the checkpoint; plain types only."""
        ...


class BlendedSamples:
    """Corpora blended by weight, and their validation parts."""

    def __init__(
        self, options: TrainOptions, groups: Groups, facts: Sequence[CorpusFacts], vocab_size: int
    ) -> None:
        self._options, self._groups = options, groups
        self._batch = options.batch_size(groups.data_parallel)
        wanted = options.samples_after(options.train_iters, groups.data_parallel)
        counts = wanted, options.eval_iters * self._batch
        self.train, self._validation = build_datasets(options, facts, counts, vocab_size)

    def is_due(self, iteration: int) -> bool:
        return False

    def validate(
        self, model: LanguageModel, log: MetricsLog, iteration: int, consumed: int
    ) -> float:
        return self.loss(model)

    @torch.no_grad()
    def loss(self, model: LanguageModel) -> float:
        """Loss on the first ``--eval-iters`` batches of the validation part: always the same."""
        groups, share = self._groups, 0.0
        step = step_of(self._options, groups, 0, self._batch)
        model.eval()
        for index in range(self._options.eval_iters):
            data = microbatches(self._validation, index * self._batch, step, groups)
            (mine,) = forward_backward(
                model, data, step, groups, lm_loss, [LM_LOSS], forward_only=True
            )
            share += mine
        (loss,) = groups.sum_over_ranks(share / self._options.eval_iters)
        return loss

    def tell(self, log: MetricsLog, consumed: int) -> None:
        pass

    def state(self, consumed: int) -> dict[str, Any]:
        return {"domains": None}
