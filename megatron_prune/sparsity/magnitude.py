"""Magnitude: the smallest weights of each matrix go, whatever enters it.

The baseline of Sun et al. 2023 (arXiv:2306.11695) and of Frantar and Alistarh 2023
(arXiv:2301.00774), with the threshold as the former's code has it: the value at place
``int(count * share)`` of the sorted sizes, and all that is not above goes, so one weight more than
asked for, and every equal one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt, kth_smallest_each
from megatron_prune.sparsity.choosing import count_close, lowest_in_groups, masked
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared, Sparse


def lowest_of_matrices(
    keys: Sequence[Tensor], share: float, dealt: Dealt
) -> list[tuple[Tensor, int]]:
    """For each matrix the mask of all keys up to the one at place ``int(count * share)``.

    Args:
        keys: this rank's rows [R, I] of each, float32, not below zero.

    Returns:
        Of each the mask of this rank's rows, and how many kept ones were close.
    """
    sizes = torch.tensor([x.numel() for x in keys], device=keys[0].device)
    places = [int(size * share) for size in dealt.total(sizes).tolist()]
    found = []
    for x, threshold in zip(keys, kth_smallest_each(keys, places, dealt)):
        mask = x <= threshold
        found.append((mask, count_close(x, int(mask.count_nonzero()), threshold)))
    return found


def find(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[tuple[Tensor, int]]:
    """Of each matrix the mask of what goes of this rank's rows, and how many were close."""
    keys = [weight.abs() for weight in weights]
    if asked.pattern is not None:
        return [lowest_in_groups(x, asked.pattern) for x in keys]
    return lowest_of_matrices(keys, asked.share, dealt)


def prune(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    """See `Method`. Costs some 10 ns a weight."""
    return masked(weights, find(weights, prepared, asked, how, dealt))


def prepare(inputs: Inputs, how: How) -> Prepared:
    """Nothing."""
    return {}


METHOD = Method(name="magnitude", needs="weights", updates=False, prepare=prepare, prune=prune)
