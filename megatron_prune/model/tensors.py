"""The only slicing code: `take` along named axes, and Megatron's fused storage taken apart.

Shape suffixes: D hidden, Q query heads x kv_channels, K groups x kv_channels, F FFN channels,
G groups, and d kv_channels; ``*`` is the trailing hidden dim, absent for a bias.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def expand_rows(index: Tensor, rows: int) -> Tensor:
    """Indices of an axis -> rows of a tensor that gives each index ``rows`` of them. int64."""
    if rows == 1:
        return index
    return (index[:, None] * rows + torch.arange(rows)).flatten()


def take(x: Tensor, axes: str, kept: Mapping[str, Tensor], rows: Mapping[str, int]) -> Tensor:
    """Keep some indices of some axes of a tensor.

    numpy does the copying: its ``take`` is four times as fast as ``index_select`` on rows and on
    columns alike (bf16, 11008 x 4096, one thread: 7 and 19 ms against 34 and 80).

    Args:
        x: one dim per letter of ``axes``; in host memory, of a dtype of 1 to 8 bytes.
        kept: axis -> [n] int64 sorted indices; an axis that is absent is kept whole.
        rows: axis -> rows per index, 1 when absent.

    Returns:
        A copy where something was dropped, else ``x`` itself.
    """
    if not any(axis in kept for axis in axes):
        return x
    values = x.view(_SAME_SIZE[x.dtype.itemsize]).numpy()
    for dim, axis in enumerate(axes):
        if axis in kept:
            values = values.take(expand_rows(kept[axis], rows.get(axis, 1)).numpy(), axis=dim)
    return torch.from_numpy(values).view(x.dtype)


def fuse_qkv(q_Q: Tensor, k_K: Tensor, v_K: Tensor, groups: int, kv_channels: int) -> Tensor:
    """Megatron's ``linear_qkv``: per query group its q heads, then k, then v.

    Args:
        q_Q: [groups * heads_per_group * kv_channels, *].
        k_K: [groups * kv_channels, *]; ``v_K`` likewise.

    Returns:
        [groups * (heads_per_group + 2) * kv_channels, *].
    """
    parts = [x.reshape(groups, -1, kv_channels, *x.shape[1:]) for x in (q_Q, k_K, v_K)]
    fused = torch.cat(parts, dim=1)
    return fused.reshape(-1, *q_Q.shape[1:])


def unfuse_qkv(fused: Tensor, part: str, heads_per_group: int, kv_channels: int) -> Tensor:
    """One of ``q``, ``k``, ``v`` out of ``linear_qkv``; the inverse of `fuse_qkv`.

    Args:
        fused: [groups * (heads_per_group + 2) * kv_channels, *].
    """
    heads = heads_per_group
    x = fused.reshape(-1, heads + 2, kv_channels, *fused.shape[1:])
    first, last = {"q": (0, heads), "k": (heads, heads + 1), "v": (heads + 1, heads + 2)}[part]
    return x[:, first:last].reshape(-1, *fused.shape[1:])
