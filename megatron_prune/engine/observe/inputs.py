"""What enters a layer's linears, added up over windows and joined over ranks.

Shape suffixes: s sequence, b batch (1), T tokens, I inputs, n this rank's inputs of a projection.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.engine.groups import Groups
from megatron_prune.sparsity.method import Inputs


class InputSums:
    """Sums over the inputs of some linears while they grow.

    Products of one window are float32, sums over windows float64, so that it makes no difference
    how windows are dealt out over data-parallel ranks. Of the Gram matrix a tensor-parallel rank
    has its rows: ``I^2 / TP * 8`` bytes, and ``I^2 * 4`` once it is joined.

    Args:
        size: I.
        gram: whether the Gram matrix is needed.
    """

    def __init__(self, size: int, groups: Groups, *, gram: bool) -> None:
        parts, part = groups.grid.tensor_parallel, groups.tp_rank
        self._groups, device = groups, groups.device
        self._rows = slice(size * part // parts, size * (part + 1) // parts)
        self._squares = torch.zeros(size, dtype=torch.float64, device=device)
        height = self._rows.stop - self._rows.start
        self._gram = None
        if gram:
            self._gram = torch.zeros(height, size, dtype=torch.float64, device=device)

    def add(self, x_TI: Tensor, weight: float = 1.0) -> None:
        """One window's whole inputs, the same on tensor-parallel ranks.

        Args:
            weight: of its squares.
        """
        x_TI = x_TI.float()
        self._squares += weight * x_TI.square().sum(0, dtype=torch.float64)
        if self._gram is not None:
            self._gram += x_TI[:, self._rows].T @ x_TI

    def reduce(self, windows: int) -> Inputs:
        """Over all ``windows``; the same on every rank. The sums are given away."""
        dist.all_reduce(self._squares, group=self._groups.dp_group)
        gram = None
        if self._gram is not None:
            size = len(self._squares)
            dist.all_reduce(self._gram, group=self._groups.dp_group)
            gram = torch.zeros(size, size, device=self._gram.device)
            gram[self._rows], self._gram = self._gram.float(), None
            dist.all_reduce(gram, group=self._groups.tp_group)  # joins the rows
        return Inputs(windows=windows, squares_I=self._squares / windows, gram_II=gram)


def gathered(mine_sbn: Tensor, groups: Groups) -> Tensor:
    """A projection's input from all tensor-parallel ranks, [T, N]."""
    parts = [torch.empty_like(mine_sbn) for _ in range(groups.grid.tensor_parallel)]
    dist.all_gather(parts, mine_sbn.contiguous(), group=groups.tp_group)
    return torch.cat(parts, dim=-1).flatten(0, 1)
