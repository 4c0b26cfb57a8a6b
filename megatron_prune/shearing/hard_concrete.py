"""Hard-concrete gates: Louizos et al. 2018, arXiv:1712.01312, as Sheared LLaMA uses them.

A gate's parameter is ``a``, the log of how open it is. Trained, the gate is drawn: equations 10 and
11 with temperature 2/3 and limits -0.1 and 1.1. Judged, it is what it is without noise, and of each
row the lowest are shut. The constants are those of princeton-nlp/LLM-Shearing's ``L0Module``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.shearing.units import Gated

TEMPERATURE, LOW, HIGH, EPSILON = 2 / 3, -0.1, 1.1, 1e-6
BOUND = math.log(100)  # of ``a``; the official code clamps it before every use
SHARPNESS = 0.8  # of a gate that is judged, against one that is drawn
START, SPREAD = 5.0, 0.01  # the official beginning: above the bound, where all gates are tied


def sampled(a: Tensor, u: Tensor) -> Tensor:
    """Gates as they are drawn, eq. 10 and 11.

    Args:
        a: any shape, float32.
        u: of the same shape, uniform in (EPSILON, 1 - EPSILON).

    Returns:
        In [0, 1]; the gradient by ``a`` is 0 where a gate is at either end.
    """
    s = torch.sigmoid((u.log() - (1 - u).log() + a) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def presence(a: Tensor) -> Tensor:
    """How likely a gate is not shut, eq. 12: 1 - P(z = 0), in [EPSILON, 1 - EPSILON]."""
    shut = torch.sigmoid(TEMPERATURE * math.log(-LOW / HIGH) - a)
    return 1 - shut.clamp(EPSILON, 1 - EPSILON)


def judged(a: Tensor) -> Tensor:
    """Gates without noise, before the lowest are shut: 0.996 where ``a`` is at the bound."""
    return torch.sigmoid(SHARPNESS * a / TEMPERATURE)


def uniform(count: int, generator: torch.Generator) -> Tensor:
    """[count] float32, uniform in (EPSILON, 1 - EPSILON), for `sampled`."""
    return torch.rand(count, generator=generator) * (1 - 2 * EPSILON) + EPSILON


class HardConcrete:
    """The method of a run's masks, see `method.MaskMethod`."""

    rates = (1.0, 1.0, 1.0)
    betas = (0.9, 0.95)  # of LLM-Shearing's optimizer
    has_noise = True
    is_exact = False

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        return START + SPREAD * torch.randn(count, generator=generator)

    def ordered(self, rank: Tensor) -> Tensor:
        """From the bound downwards by a criterion's rank: the lowest begin at half of it."""
        return BOUND * (0.5 + 0.5 * rank)

    def drawn(self, a: Tensor, u: Tensor | None, share: float, axes: Sequence[Gated]) -> Tensor:
        assert u is not None
        return sampled(a, u)

    def presence(self, a: Tensor, share: float, axes: Sequence[Gated]) -> Tensor:
        return presence(a)

    def score(self, a: Tensor) -> Tensor:
        return judged(a)

    def judged(self, a: Tensor) -> Tensor:
        return judged(a)

    def bound(self, a: Tensor) -> None:
        a.clamp_(-BOUND, BOUND)
