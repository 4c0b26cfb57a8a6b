"""Gates without noise: Huang et al. 2026, arXiv:2603.08065, deterministic differentiable pruning.

A gate's parameter ``z`` is the gate: m = ReLU(z), which may exceed 1, so that training and export
multiply by the same number. How far it counts as open is another function of it, s, that is 0 for a
shut gate and 1 from about 2 mu on; mu falls during the run, so that what counts is first "near 1 or
near 0" and at last "shut or not". Beside the two terms of the constraint a third one, l3 s (1 - s),
makes gates decide. The constants are those of the authors' code (yellowtree123/Deterministic-
Differentiable-Pruning at a373238) but for the last mu, 0.05 in the paper and 0.1 in the code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.shearing.method import straight_through
from megatron_prune.shearing.units import Gated

START, SPREAD = 1.0, 0.01
LOWEST = -0.1  # of ``z``: so far a shut gate has to come back
FIRST_MU, LAST_MU = 0.5, 0.05
SHARPNESS, LOW, HIGH = 2.4, -0.1, 1.1


def opened(z: Tensor) -> Tensor:
    """m = ReLU(z), with the gradient of z: a shut gate is still pulled open by the loss."""
    return straight_through(z.relu(), z)


def middle(share: float) -> float:
    """mu, the gate that counts as half open, when so large a share of the run is over."""
    return FIRST_MU - (FIRST_MU - LAST_MU) * math.sqrt(share)


def presence(z: Tensor, share: float) -> Tensor:
    """s, in [0, 1], how far a gate counts as open.

    Its clamp and the ReLU before it let gradients through, as in the authors' code: of a gate at 0
    and below s is 0, and its gradient that at 0.
    """
    mu = middle(share)
    s = torch.sigmoid((opened(z) - mu) * (SHARPNESS / mu)) * (HIGH - LOW) + LOW
    return straight_through(s.clamp(0, 1), s)


class Deterministic:
    """The method of a run's masks, see `method.MaskMethod`."""

    rates = (2e-2, 2e-2, 4e-1, 2e-2)
    betas = (0.9, 0.999)
    has_noise = False
    is_exact = False

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        return START + SPREAD * torch.randn(count, generator=generator)

    def ordered(self, rank: Tensor) -> Tensor:
        """As wide as the official beginning is, by a criterion's rank: the model stays itself."""
        return START + SPREAD * 4 * (rank - 0.5)

    def drawn(self, a: Tensor, u: Tensor | None, share: float, axes: Sequence[Gated]) -> Tensor:
        return opened(a)

    def presence(self, a: Tensor, share: float, axes: Sequence[Gated]) -> Tensor:
        return presence(a, share)

    def score(self, a: Tensor) -> Tensor:
        """How far above the floor: orders shut gates too, of which none is better by its index."""
        return a - LOWEST

    def judged(self, a: Tensor) -> Tensor:
        return a.relu()

    def bound(self, a: Tensor) -> None:
        a.clamp_(min=LOWEST)
