"""What became of a matrix: its zeros, Wanda's energy that is left, and the error of its outputs.

Shape suffixes: R this rank's rows, I inputs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_prune.sparsity.method import Inputs


def facts_of(before_RI: Tensor, after_RI: Tensor, inputs: Inputs | None) -> Tensor:
    """[7] float64 of this rank's rows: zeros, values, kept and whole sum of Wanda's squared scores,
    squared error and size of the outputs, values that are not finite."""
    facts = torch.zeros(7, dtype=torch.float64, device=before_RI.device)
    facts[0], facts[1] = (after_RI == 0).sum(), after_RI.numel()
    facts[6] = (~after_RI.isfinite()).sum()
    if inputs is None:
        return facts
    squares_I = inputs.squares_I.to(before_RI.device)
    if (unit := _unit(before_RI)) != 1:
        before_RI, after_RI = before_RI / unit, after_RI / unit
    scores_RI = before_RI.square()
    facts[3] = scores_RI.sum(0, dtype=torch.float64) @ squares_I
    facts[2] = (scores_RI * (after_RI != 0)).sum(0, dtype=torch.float64) @ squares_I
    if inputs.gram_II is not None:
        lost_RI = before_RI - after_RI
        facts[4] = ((lost_RI @ inputs.gram_II) * lost_RI).sum(dtype=torch.float64)
        facts[5] = ((before_RI @ inputs.gram_II) * before_RI).sum(dtype=torch.float64)
    facts[2:6] *= unit**2
    return facts


def _unit(x: Tensor) -> float:
    """What to divide by before squaring, since float32 has no squares of 1e20 and of 1e-25: 1, or
    a power of two near the largest value, by which dividing rounds nothing."""
    most = float(x.abs().max()) if x.numel() else 0.0
    return 1.0 if most == 0 or 1e-12 < most < 1e12 else 2.0 ** (math.frexp(most)[1] - 1)


def rounded_share(part: float, whole: float) -> float | None:
    """Rounded; None of nothing, and of what is beyond float32."""
    share = part / whole if whole else math.nan
    return float(f"{share:.6g}") if math.isfinite(share) else None
