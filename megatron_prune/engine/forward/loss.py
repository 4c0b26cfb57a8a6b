"""Cross entropy over a vocabulary that is split over tensor-parallel ranks and padded.

Padded rows take no part: their logits never enter the softmax, and their gradient is zero. Works
in place on the logits, in blocks of rows that stay in the cache: one pass over memory forward and
one backward, where a log-softmax needs four and another buffer of the logits' size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

_BLOCK_BYTES = 1 << 21  # of float32 logits a block; a level-2 cache


def real_columns(vocab_size: int, padded_per_rank: int, tp_rank: int) -> int:
    """How many of a rank's vocabulary rows are tokens; the rest is padding."""
    return max(0, min(padded_per_rank, vocab_size - tp_rank * padded_per_rank))


def _blocks(flat: Tensor) -> list[slice]:
    rows, columns = flat.shape
    step = rows if flat.device.type != "cpu" else max(1, _BLOCK_BYTES // (4 * max(columns, 1)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, max(step, 1))]


class _VocabularyCrossEntropy(torch.autograd.Function):
    """-log softmax at the target; turns the logits into exp(logits - max), kept for backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, columns: int, group: ProcessGroup
    ) -> Tensor:
        split = group.size() > 1
        scores = logits if logits.dtype == torch.float32 else logits.float()
        flat, local = scores.view(-1, scores.shape[-1]), targets.reshape(-1)
        local = local - group.rank() * flat.shape[1]
        mine = (local >= 0) & (local < columns)
        local = torch.where(mine, local, 0)
        flat[:, columns:] = 0
        target = flat.gather(1, local[:, None]).squeeze(1)
        largest = flat.new_full((len(flat),), -torch.inf)
        total = flat.new_zeros(len(flat))
        blocks = _blocks(flat)
        if split or columns == 0:
            if columns:
                torch.amax(flat[:, :columns], dim=1, out=largest)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        for rows in blocks if columns else []:
            block = flat[rows, :columns]
            if not split:
                torch.amax(block, dim=1, out=largest[rows])
            block.sub_(largest[rows, None]).exp_()
            torch.sum(block, dim=1, out=total[rows])
        target = torch.where(mine, target - largest, 0)
        if split:
            both = torch.stack([total, target])
            dist.all_reduce(both, group=group)
            total, target = both
        ctx.save_for_backward(scores, total, local, mine)
        ctx.dtype = logits.dtype
        return (total.log() - target).view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        scores, total, local, mine = ctx.saved_tensors
        grad = grads[0].reshape(-1)
        flat = scores.view(-1, scores.shape[-1])
        scale = (grad / total)[:, None]
        for rows in _blocks(flat):
            flat[rows].mul_(scale[rows])
        flat.scatter_add_(1, local[:, None], torch.where(mine, -grad, 0)[:, None])
        return scores.to(ctx.dtype), None, None, None


def token_losses(
    logits_sbV: Tensor, targets_sb: Tensor, *, vocab_size: int, group: ProcessGroup
) -> Tensor:
    """Nats of each target token, equal on all tensor-parallel ranks.

    Args:
        logits_sbV: [s, b, padded vocabulary / TP], this rank's part; overwritten.
        targets_sb: [s, b] token ids below ``vocab_size``.
        vocab_size: tokens of the whole vocabulary, without padding.
        group: the tensor-parallel ranks.

    Returns:
        [s, b] float32.
    """
    columns = real_columns(vocab_size, logits_sbV.shape[-1], group.rank())
    loss: Tensor = _VocabularyCrossEntropy.apply(logits_sbV, targets_sb, columns, group)
    return loss
