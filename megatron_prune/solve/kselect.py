"""The k-th value of a matrix whose rows are dealt out over ranks: the same at every number of them.

Keys are non-negative float32, whose bits, read as integers, are in the same order as the values.
So a byte of the k-th key is known when every rank has counted its keys by that byte: four passes
from the highest byte down, each over the keys that agree with what is known so far, and each one
sum of 256 counters over ranks (radix select). Equal keys are told apart by their place in the whole
matrix, row by row. A rank that has everything takes numpy's partition instead, which gives the same
and is three times as fast.

Refused by an assertion: keys below zero, minus zero included, and those that are no number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_INFINITY_BITS = 0x7F800000


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """How a matrix's rows are dealt out: rank by rank, each rank one block, which may be empty.

    Attributes:
        rank, ranks: this rank's place, and how many there are.
        total: the sum of a tensor (int64 or float64) over all ranks; a collective that every rank
            calls in the same order with the same shape.
    """

    rank: int = 0
    ranks: int = 1
    total: Callable[[Tensor], Tensor] = _alone


ALONE = Dealt()


def kth_smallest(keys: Tensor, k: int, dealt: Dealt = ALONE) -> float:
    """The key at place k, counted from 0, of all ranks' keys sorted upwards.

    Alone it costs some 7 ns a key; over ranks about 30 ns a key of this rank and four sums of 256
    int64.

    Args:
        keys: float32 of any shape, this rank's; not below zero.
        k: 0 <= k < number of keys on all ranks, which is for the caller to know.
    """
    return kth_smallest_each([keys], [k], dealt)[0]


def kth_smallest_each(
    keys: Sequence[Tensor], places: Sequence[int], dealt: Dealt = ALONE
) -> list[float]:
    """`kth_smallest` of several matrices, with the sums over ranks taken together: four in all."""
    bits = [_checked_bits(x) for x in keys]
    if dealt.ranks == 1:
        return [_kth_alone(x, k) for x, k in zip(keys, places)]
    found, left = [0] * len(bits), list(places)
    for shift in (24, 16, 8, 0):
        bytes_ = [(x >> shift) & 255 for x in bits]
        counted = torch.stack([torch.bincount(x, minlength=256) for x in bytes_])
        upto = dealt.total(counted).cumsum(1).cpu()
        for i, k in enumerate(left):
            assert 0 <= k < upto[i, -1], f"place {k} of {int(upto[i, -1])} keys"
            byte = int(torch.searchsorted(upto[i], k, right=True))
            left[i] = k - (int(upto[i, byte - 1]) if byte else 0)
            found[i] |= byte << shift
            bits[i] = bits[i][bytes_[i] == byte]
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).tolist()


def lowest(keys: Tensor, k: int, dealt: Dealt = ALONE) -> Tensor:
    """A mask of exactly k keys over all ranks: the lowest, and of equal ones those that come first.

    Costs a `kth_smallest`, and one more sum over ranks.

    Args:
        keys: this rank's rows [R, ...] float32, not below zero.
        k: 0 <= k <= number of keys on all ranks.

    Returns:
        bool of the keys' shape.
    """
    if k == 0:
        return torch.zeros_like(keys, dtype=torch.bool)
    threshold = kth_smallest(keys, k - 1, dealt)
    mask, equal = keys < threshold, keys == threshold
    counts = torch.zeros(1 + dealt.ranks, dtype=torch.int64, device=keys.device)
    counts[0], counts[1 + dealt.rank] = mask.count_nonzero(), equal.count_nonzero()
    below, *equals = dealt.total(counts).tolist()
    mine = min(max(k - below - sum(equals[: dealt.rank]), 0), equals[dealt.rank])
    if mine == equals[dealt.rank]:
        return mask | equal
    first = equal.flatten().nonzero()[:mine, 0]
    mask.view(-1)[first] = True
    return mask


def _checked_bits(keys: Tensor) -> Tensor:
    """The keys as int32, in one row."""
    assert keys.dtype == torch.float32, keys.dtype
    bits = keys.contiguous().view(torch.int32).flatten()
    if len(bits):
        low, high = bits.aminmax()
        assert low >= 0 and high <= _INFINITY_BITS, "keys below zero, or no numbers"
    return bits


def _kth_alone(keys: Tensor, k: int) -> float:
    assert 0 <= k < keys.numel(), f"place {k} of {keys.numel()} keys"
    if keys.device.type == "cpu":
        return float(np.partition(keys.numpy(), k, axis=None)[k])
    return float(keys.flatten().kthvalue(k + 1).values)
