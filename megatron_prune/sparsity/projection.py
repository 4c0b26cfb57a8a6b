"""The projection of ADMM: a matrix with all but its largest weights set to zero.

Shape suffixes: R this rank's rows of one matrix, I inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt, kth_smallest, lowest
from megatron_prune.sparsity.choosing import count_close, lowest_in_groups
from megatron_prune.sparsity.method import Asked, Pattern


@dataclass(frozen=True, kw_only=True)
class Projection:
    """P: which weights of a matrix go, of any that it is tried with.

    Attributes:
        zero_RI: these go in any case.
        dropped: how many go, on all ranks.
        pattern: N:M; None where the whole matrix is compared.
    """

    zero_RI: Tensor
    dropped: int
    pattern: Pattern | None
    dealt: Dealt

    @classmethod
    def of(cls, dense_RI: Tensor, asked: Asked, dealt: Dealt) -> Projection:
        """For a matrix: ``round(count * (1 - share))`` are kept, or a pattern."""
        size = int(dealt.total(torch.tensor([dense_RI.numel()], device=dense_RI.device)))
        dropped = size - round(size * (1 - asked.share))
        return cls(zero_RI=dense_RI == 0, dropped=dropped, pattern=asked.pattern, dealt=dealt)

    def goes(self, weight_RI: Tensor, share: float = 1.0) -> Tensor:
        """The smallest, as a mask; among equals those of earlier rows, and in a row the first.

        Args:
            share: of the zeros in all. Of a pattern, when it is below 1, the smallest of those
                that would go.
        """
        keys, dropped = self._keys(weight_RI), round(self.dropped * share)
        if self.pattern is not None:
            goes = lowest_in_groups(keys, self.pattern)[0]
            if dropped == self.dropped:
                return goes | self.zero_RI
            keys = keys.masked_fill_(~goes, math.inf)
        return lowest(keys, dropped, self.dealt) | self.zero_RI

    def close(self, weight_RI: Tensor, goes_RI: Tensor) -> int:
        """How many of the kept ones were close, when these go."""
        keys = self._keys(weight_RI)
        if self.pattern is not None:
            return lowest_in_groups(keys, self.pattern)[1]
        if self.dropped == 0:
            return 0
        threshold = kth_smallest(keys, self.dropped - 1, self.dealt)
        return count_close(keys, int(goes_RI.count_nonzero()), threshold)

    def _keys(self, weight_RI: Tensor) -> Tensor:
        return weight_RI.square().mul_(~self.zero_RI)
