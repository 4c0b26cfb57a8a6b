"""Moments of a least-squares problem, added up over windows and joined over ranks.

Shape suffixes: T tokens, K inputs, D outputs.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.engine.groups import Groups
from megatron_prune.solve.least_squares import Moments


class MomentSums:
    """Moments while they grow: this tensor-parallel rank's rows of the matrices.

    Products of one window are float32, sums over windows float64: ``K (K + D) / TP * 8`` bytes.

    Attributes:
        rows: which of the inputs are this rank's share.
    """

    def __init__(self, inputs: int, outputs: int, groups: Groups) -> None:
        parts, part = groups.grid.tensor_parallel, groups.tp_rank
        self._groups, self._count = groups, 0
        self.rows = slice(inputs * part // parts, inputs * (part + 1) // parts)
        self._outs = slice(outputs * part // parts, outputs * (part + 1) // parts)
        new = partial(torch.zeros, dtype=torch.float64, device=groups.device)
        self._gram = new(self.rows.stop - self.rows.start, inputs)
        self._cross = new(self._outs.stop - self._outs.start, inputs)
        self._input_sum, self._target_sum, self._square = new(inputs), new(outputs), new(1)

    def add(self, x_TK: Tensor, target_TD: Tensor) -> None:
        """One window: whole inputs and the outputs wanted from them, the same on TP ranks."""
        x_TK, target_TD = x_TK.float(), target_TD.float()
        self._count += len(x_TK)
        self._gram += x_TK[:, self.rows].T @ x_TK
        self._cross += target_TD[:, self._outs].T @ x_TK
        self._input_sum += x_TK.sum(0, dtype=torch.float64)
        self._target_sum += target_TD.sum(0, dtype=torch.float64)
        self._square += target_TD.double().square().sum()

    def reduce(self) -> Moments:
        """Over all windows; the same on every rank."""
        size, device = len(self._input_sum), self._groups.device
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        cross = torch.zeros(len(self._target_sum), size, dtype=torch.float64, device=device)
        gram[self.rows], cross[self._outs] = self._gram, self._cross
        for x in (gram, cross):
            dist.all_reduce(x)  # joins the rows of TP ranks, sums over DP ranks
        count = torch.tensor([float(self._count)], dtype=torch.float64, device=device)
        for x in (count, self._input_sum, self._target_sum, self._square):
            dist.all_reduce(x, group=self._groups.dp_group)
        return Moments(
            count=int(count),
            gram_KK=gram,
            cross_DK=cross,
            input_sum_K=self._input_sum,
            target_sum_D=self._target_sum,
            target_square=float(self._square),
        )
