"""The projection of ADMM: a matrix with all but its largest weights set to zero.

Shape suffixes: R this rank's rows of one matrix, I inputs, M members of a group, G groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt, kth_smallest, lowest
from megatron_prune.sparsity.choosing import count_close, lowest_of_members
from megatron_prune.sparsity.method import Asked, Pattern


@dataclass(frozen=True, kw_only=True)
class Projection:
    """P: which weights of a matrix go, of any that it is tried with.

    Attributes:
        zero_IR: these go in any case.
        dropped: how many go, on all ranks.
        pattern: N:M; None where the whole matrix is compared.
    """

    zero_IR: Tensor
    dropped: int
    pattern: Pattern | None
    dealt: Dealt

    @classmethod
    def of(cls, dense_IR: Tensor, asked: Asked, dealt: Dealt) -> Projection:
        """For a matrix: ``round(count * (1 - share))`` are kept, or a pattern."""
        size = int(dealt.total(torch.tensor([dense_IR.numel()], device=dense_IR.device)))
        dropped = size - round(size * (1 - asked.share))
        return cls(zero_IR=dense_IR == 0, dropped=dropped, pattern=asked.pattern, dealt=dealt)

    def goes(self, weight_IR: Tensor, share: float = 1.0) -> Tensor:
        """The smallest, as a mask; among equals those of earlier rows, and in a row the first.

        Args:
            share: of the zeros in all. Of a pattern, when it is below 1, the smallest of those
                that would go.
        """
        keys_IR, dropped = self._keys(weight_IR), round(self.dropped * share)
        if self.pattern is not None:
            goes_IR = self._in_groups(keys_IR)[0]
            if dropped == self.dropped:
                return goes_IR | self.zero_IR
            keys_IR = keys_IR.masked_fill_(~goes_IR, math.inf)
        # row by row, for then equal keys come in the same order however rows are dealt
        return lowest(keys_IR.t().contiguous(), dropped, self.dealt).t() | self.zero_IR

    def close(self, weight_IR: Tensor, goes_IR: Tensor) -> int:
        """How many of the kept ones were close, when these go."""
        keys_IR = self._keys(weight_IR)
        if self.pattern is not None:
            return self._in_groups(keys_IR)[1]
        if self.dropped == 0:
            return 0
        threshold = kth_smallest(keys_IR, self.dropped - 1, self.dealt)
        return count_close(keys_IR, int(goes_IR.count_nonzero()), threshold)

    def _keys(self, weight_IR: Tensor) -> Tensor:
        return weight_IR.square().mul_(~self.zero_IR)

    def _in_groups(self, keys_IR: Tensor) -> tuple[Tensor, int]:
        assert self.pattern is not None
        inputs, rows = keys_IR.shape
        members, groups = self.pattern.group, inputs // self.pattern.group
        keys_MG = keys_IR.view(groups, members, rows).transpose(0, 1).flatten(1)
        mask_MG, close_G = lowest_of_members(keys_MG, self.pattern)
        mask_IR = mask_MG.view(members, groups, rows).transpose(0, 1).flatten(0, 1)
        return mask_IR, 0 if close_G is None else int(close_G.sum())
