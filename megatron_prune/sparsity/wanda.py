"""Wanda: a weight counts as much as it is large and as its input is.

Sun et al. 2023, arXiv:2306.11695, eq. 1: ``|W_ij| * ||X_j||``, compared within an output row, of
which exactly ``int(inputs * share)`` go. Its appendix has a variant whose rows differ: of each row
the smallest go while their sum stays within alpha times the sum of the row, with one alpha for a
matrix, found by bisection.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_prune.errors import DamagedError
from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity.choosing import by_variant, lowest_in_groups, lowest_in_rows, masked
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared, Sparse

_START, _HIGHEST, _NEAR = 0.4, 0.8, 0.001  # of alpha, and of shares: as in the authors' code


def prepare(inputs: Inputs, how: How) -> Prepared:
    """norm_I, float32: the root of the mean square sum over windows; a factor changes nothing.

    Raises:
        DamagedError: a norm is no number, or infinite.
    """
    norm = inputs.squares_I.sqrt().float()
    if not norm.isfinite().all():
        raise DamagedError("sums of squares of inputs that are no finite numbers")
    return {"norm_I": norm}


def scores(weight_RI: Tensor, norm_I: Tensor) -> Tensor:
    """Eq. 1: [R, I] float32, higher means keep. Scores compare within a row."""
    return weight_RI.abs().mul_(norm_I)


def find(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[tuple[Tensor, int]]:
    """Of each matrix the mask of what goes of this rank's rows, and how many were close."""
    assert not (how.variant and asked.pattern), "the variant has no pattern; refused at the flags"
    found = []
    for weight in weights:
        keys = scores(weight, prepared["norm_I"])
        if asked.pattern is not None:
            found.append(lowest_in_groups(keys, asked.pattern))
        elif how.variant:
            found.append(_by_alpha(keys, asked.share, dealt))
        else:
            found.append(lowest_in_rows(keys, int(keys.shape[1] * asked.share)))
    return found


def prune(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    """See `Method`. Costs some 10 ns a weight, the variant about 30 and ten sums over ranks."""
    return masked(weights, find(weights, prepared, asked, how, dealt))


def _by_alpha(keys_RI: Tensor, share: float, dealt: Dealt) -> tuple[Tensor, int]:
    """The variant's mask: alpha from 0.4 in [0, 0.8] until the share or the interval is within
    0.001. Equal keys go together. Sums are float64, so no row's end depends on how it is summed."""
    if keys_RI.device.type == "cpu":
        sorted_RI = torch.from_numpy(np.sort(keys_RI.numpy(), axis=1))
    else:
        sorted_RI = keys_RI.sort(dim=1).values
    sums_RI = sorted_RI.cumsum(1, dtype=torch.float64)
    size = int(dealt.total(torch.tensor([keys_RI.numel()], device=keys_RI.device)))
    alpha, low, high = _START, 0.0, _HIGHEST
    while True:
        counts_R1 = torch.searchsorted(sums_RI, alpha * sums_RI[:, -1:], right=True)
        last_R1 = sorted_RI.gather(1, (counts_R1 - 1).clamp(min=0))
        threshold_R1 = last_R1.masked_fill(counts_R1 == 0, -1.0)
        counts_R1 = torch.searchsorted(sorted_RI, threshold_R1, right=True)
        reached = int(dealt.total(counts_R1.sum().view(1))) / size
        if abs(reached - share) <= _NEAR or high - low < _NEAR:
            return by_variant(keys_RI, threshold_R1, counts_R1[:, 0])
        if reached > share:
            high, alpha = alpha, (alpha + low) / 2
        else:
            low, alpha = alpha, (alpha + high) / 2


METHOD = Method(name="wanda", needs="squares", updates=False, prepare=prepare, prune=prune)
