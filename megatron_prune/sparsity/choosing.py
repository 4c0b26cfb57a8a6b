"""Which weights go, where they are compared within a row or a group of one; and how closely.

Keys are float32 and not below zero, the lowest go, and among equals those of lower inputs. All rows
are whole, so no other rank is asked; `solve.kselect` has what spans rows.

Shape suffixes: R rows, I inputs, M members of a group, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prune.sparsity.method import CLOSE, Pattern, Sparse

_FEW = 8  # beyond, comparing all members of a group with each other costs more than parting them


def without(weight: Tensor, pruned: Tensor) -> Tensor:
    """The weights with +0.0 where they are pruned, and all others bit for bit."""
    # a product is four times as fast as masked_fill; the sum turns -0.0 into 0.0 and nothing else
    return torch.mul(weight, ~pruned).add_(0.0)


def count_close(keys: Tensor, pruned: int, threshold: float) -> int:
    """How many of the keys lie above the threshold by less than `CLOSE` of it.

    Args:
        pruned: how many of them go.
        threshold: the highest key that goes. At 0 nothing is close: it makes no difference.
    """
    if threshold == 0:
        return 0
    return int((keys <= threshold * (1 + CLOSE)).count_nonzero()) - pruned


def lowest_in_rows(keys_RI: Tensor, count: int) -> tuple[Tensor, int]:
    """A mask of exactly so many of each row, and how many kept ones were close.

    Costs some 7 ns a key on a CPU: numpy's partition, and a stable sort of those rows alone where
    equal keys are on both sides.
    """
    if count == 0 or keys_RI.numel() == 0:
        return torch.zeros_like(keys_RI, dtype=torch.bool), 0
    if keys_RI.device.type == "cpu":
        parted = np.partition(keys_RI.numpy(), count - 1, axis=1)
        threshold_R1 = torch.from_numpy(parted[:, count - 1 : count].copy())
    else:
        threshold_R1 = keys_RI.kthvalue(count, dim=1, keepdim=True).values
    mask = keys_RI <= threshold_R1
    tied = (mask.count_nonzero(1) != count).nonzero()[:, 0]
    if len(tied):
        first = keys_RI[tied].sort(dim=1, stable=True).indices[:, :count]
        mask[tied] = torch.zeros_like(mask[tied]).scatter_(1, first, True)
    return mask, _close_in_rows(keys_RI, threshold_R1, count)


def _close_in_rows(keys_RI: Tensor, threshold_R1: Tensor, count: int | Tensor) -> int:
    over = (keys_RI <= threshold_R1 * (1 + CLOSE)).count_nonzero(1) - count
    return int((over * (threshold_R1[:, 0] > 0)).sum())


def lowest_in_groups(keys_RI: Tensor, pattern: Pattern) -> tuple[Tensor, int]:
    """A mask of what N:M prunes of every group of M consecutive inputs, and how many were close.

    M divides I. Costs some 10 ns a key: groups of a few by comparing all their members with each
    other, larger ones like rows.
    """
    drop = pattern.group - pattern.keep
    if pattern.group > _FEW:
        mask, close = lowest_in_rows(keys_RI.reshape(-1, pattern.group), drop)
        return mask.view_as(keys_RI), close
    keys_MG = keys_RI.reshape(-1, pattern.group).t().contiguous()
    place_MG = torch.zeros(keys_MG.shape, dtype=torch.uint8, device=keys_MG.device)
    for member in range(pattern.group - 1):
        is_lower = keys_MG[member + 1 :] < keys_MG[member]  # equal: the earlier goes first
        place_MG[member] += is_lower.sum(0, dtype=torch.uint8)
        place_MG[member + 1 :] += ~is_lower
    mask_MG = place_MG < drop
    close_G = _close_of_members(keys_MG, mask_MG, (keys_MG * mask_MG).amax(0))
    return mask_MG.t().reshape(keys_RI.shape), int(close_G.sum())


def lowest_of_members(keys_MR: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor | None]:
    """The same for one group of each row, its members one below the other.

    Made for few groups, where the number of operations counts: four, where none is close.

    Returns:
        The mask [M, R], and how many kept ones of each row were close [R], None for no one.
    """
    drop = pattern.group - pattern.keep
    highest_R = keys_MR.topk(drop, 0, largest=False).values[-1]
    mask_MR = keys_MR <= highest_R * (1 + CLOSE)
    if int(mask_MR.count_nonzero()) == drop * keys_MR.shape[1]:
        return mask_MR, None  # neither is one close, nor are there equal ones on both sides
    mask_MR = lowest_in_rows(keys_MR.t().contiguous(), drop)[0].t()
    return mask_MR, _close_of_members(keys_MR, mask_MR, highest_R)


def _close_of_members(keys_MG: Tensor, mask_MG: Tensor, highest_G: Tensor) -> Tensor:
    is_near = keys_MG <= highest_G * (1 + CLOSE)
    return is_near.logical_and_(highest_G > 0).sum(0) - (mask_MG & (highest_G > 0)).sum(0)


def by_variant(keys_RI: Tensor, threshold_R1: Tensor, counts_R: Tensor) -> tuple[Tensor, int]:
    """A mask of the keys up to each row's own threshold, and how many above were close."""
    return keys_RI <= threshold_R1, _close_in_rows(keys_RI, threshold_R1, counts_R)


def masked(weights: Sequence[Tensor], found: Sequence[tuple[Tensor, int]]) -> list[Sparse]:
    """The weights that masks leave, and how many decisions were close, as answers."""
    return [
        Sparse(weight_RI=without(weight, mask), close=close)
        for weight, (mask, close) in zip(weights, found)
    ]
