"""The k-th value of a matrix whose rows are dealt out over ranks: the same at every number of them.

(SKELETON: helper "maths" fills this in.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _alone(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True, kw_only=True)
class Dealt:
    """How a matrix's rows are dealt out: in blocks, rank by rank, each rank one block (may be empty).

    Attributes:
        rank, ranks: this rank's place, and how many there are.
        total: the sum of a tensor (int64 or float64) over all ranks; a collective that every rank
            calls in the same order with the same shape.
    """

    rank: int = 0
    ranks: int = 1
    total: Callable[[Tensor], Tensor] = _alone


ALONE = Dealt()
