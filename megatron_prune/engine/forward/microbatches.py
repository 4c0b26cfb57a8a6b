"""Microbatches: made of samples, and run forward and backward through the pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.engine.forward.context import own_part
from megatron_prune.engine.groups import Groups


class Microbatch(NamedTuple):
    """Some samples, of each the part that this context-parallel rank holds.

    Attributes:
        tokens, labels: [b, s] int64.
        mask: [b, s] float32, what each token's loss counts.
        counted: [] float32, the sum of the mask over the whole sequences, at least 1.
    """

    tokens: Tensor
    labels: Tensor
    mask: Tensor
    counted: Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all microbatches of a step have in common.

    Attributes:
        iteration: the step's number, from 1 on; 0 of a validation.
        count: microbatches on this data-parallel rank.
        rows, length: samples of a microbatch, and tokens of a sample.
    """

    iteration: int
    count: int
    rows: int
    length: int


Loss = Callable[[Tensor, Microbatch], tuple[Tensor, dict[str, Tensor]]]


def microbatch(samples: Sequence[Mapping[str, Tensor]], groups: Groups) -> Microbatch:
    """Samples of a GPTDataset on this rank's device."""
    tokens, labels, mask = (
        torch.stack([sample[key] for sample in samples]).to(groups.device, non_blocking=True)
        for key in ("tokens", "labels", "loss_mask")
    )
    counted = mask.sum().clamp(min=1)
    tokens, labels, mask = own_part(groups.cp_group, tokens, labels, mask)
    return Microbatch(tokens, labels, mask, counted)


def microbatches(dataset: Any, consumed: int, step: Step, groups: Groups) -> Iterator[Microbatch]:
    """This data-parallel rank's microbatches of a step, in Megatron's order."""
    for index in range(step.count):
        first = consumed + (index * groups.data_parallel + groups.dp_rank) * step.rows
        yield microbatch([dataset[first + i] for i in range(step.rows)], groups)


def lm_loss(losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
    """This context-parallel rank's share of the mean loss, and the same to be told."""
    mean = (losses_bs * batch.mask).sum() / batch.counted
    return mean, {"lm loss": mean.detach().clone()}


def forward_backward(
    model: Any,
    batches: Iterator[Microbatch],
    step: Step,
    groups: Groups,
    loss: Loss,
    told: Sequence[str] = (),
    *,
    forward_only: bool,
) -> list[float]:
    """Run a step's microbatches through the pipeline; gradients stay where the model keeps them.

    Args:
        model: or what wraps it.
        loss: (losses [b, s], microbatch) -> what is minimised, and values by name; called on the
            last stage.
        told: names of the values to return.

    Returns:
        This rank's shares; those of all ranks sum to the means over microbatches and copies.
    """

    def forward(batches: Iterator[Microbatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches)
        losses_bs = model(batch.tokens, None, None, labels=batch.labels)
        return losses_bs, lambda losses_bs: loss(losses_bs, batch)

    def forward_inside(_: Any, model: Any) -> tuple[Tensor, Any]:
        return model(None, None, None), None  # a stage that sees no tokens

    is_inside = not (groups.is_first_stage or groups.is_last_stage)
    found = get_forward_backward_func()(
        forward_step_func=forward_inside if is_inside else forward,
        data_iterator=batches,
        model=model,
        num_microbatches=step.count,
        seq_length=step.length,
        micro_batch_size=step.rows,
        forward_only=forward_only,
    )
    copies, split = groups.data_parallel, groups.grid.tensor_parallel
    return [sum(float(one[name]) for one in found) / step.count / copies / split for name in told]
