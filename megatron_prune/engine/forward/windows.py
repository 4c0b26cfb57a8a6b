"""Forward only: the loss of windows of tokens, under any TP, PP and DP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.groups import Groups

_CALLS_PER_STAGE = 4  # microbatches in flight per pipeline stage: 80% of the stages at work


def microbatches_at_once(groups: Groups) -> int:
    """How many microbatches to hand to the pipeline in one call."""
    stages = groups.grid.pipeline_parallel
    return 1 if stages == 1 else _CALLS_PER_STAGE * stages


def _window_means(losses_bS: Tensor) -> Tensor:
    return losses_bS[:, :-1].double().mean(1)


@torch.no_grad()
def window_losses(
    model: LanguageModel,
    windows_WS: Tensor,
    groups: Groups,
    *,
    micro_batch_size: int,
    progress: Callable[[int], object] = lambda windows: None,
) -> Tensor:
    """Mean loss of each window: the mean over its S - 1 targets, in nats.

    Args:
        windows_WS: [W, S] int64 token ids, the same on all ranks.
        progress: called on all ranks with the number of windows just scored.

    Returns:
        [W] float64, the same on all ranks.
    """
    count, length = windows_WS.shape
    per_step = micro_batch_size * groups.data_parallel
    stages = groups.grid.pipeline_parallel
    steps = -(-count // per_step)
    # the last step is filled up with the first window, whose extra losses are cut off again
    order = torch.zeros(steps * per_step, dtype=torch.int64)
    order[:count] = torch.arange(count)
    batches = order.view(steps, groups.data_parallel, micro_batch_size)[:, groups.dp_rank]
    found = torch.zeros(steps, micro_batch_size, dtype=torch.float64, device=groups.device)
    at_once = microbatches_at_once(groups)
    model.eval()
    for first in range(0, steps, at_once):
        last = min(first + at_once, steps)
        tokens = (windows_WS[i].to(groups.device) for i in batches[first:last])
        # the last position has no target: any label will do, its loss is cut off
        batch = ((tokens_bS, tokens_bS.roll(-1, dims=1)) for tokens_bS in tokens)
        losses = microbatch_results(
            model, batch, last - first, micro_batch_size, length, _window_means
        )
        if groups.is_last_stage:
            found[first:last] = torch.stack(losses).double()
        progress(min(last * per_step, count) - min(first * per_step, count))
    if stages > 1:
        dist.broadcast(found, dist.get_process_group_ranks(groups.pp_group)[-1], groups.pp_group)
    everyone = [torch.empty_like(found) for _ in range(groups.data_parallel)]
    dist.all_gather(everyone, found, group=groups.dp_group)
    return torch.stack(everyone, dim=1).flatten()[:count].cpu()


def microbatch_results(
    model: LanguageModel,
    batches: Iterator[tuple[Tensor, ...]],
    count: int,
    micro_batch_size: int,
    length: int,
    reduce: Callable[..., Tensor],
) -> list[Tensor]:
    """What ``reduce`` makes of the losses of ``count`` microbatches, on the last stage.

    Args:
        batches: (tokens [b, S], labels [b, S], ...) on the last and the first stage's device.
        reduce: (losses [b, S], ...) -> tensor, with what follows the labels in a batch.
    """

    def forward(batches: Iterator[Any], model: LanguageModel) -> tuple[Tensor, object]:
        tokens_bS, labels_bS, *rest = next(batches)
        losses_bS = model(tokens_bS, None, None, labels=labels_bS)
        return losses_bS, lambda losses_bS, non_loss_data: reduce(losses_bS, *rest)

    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=batches,
        model=model,
        num_microbatches=count,
        seq_length=length,
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found
