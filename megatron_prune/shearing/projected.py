"""Masks of exactly the target in every step: GRASPrune, Wang et al. 2026, arXiv:2604.19398.

A unit's parameter ``z`` says how likely it is to stay, p = sigmoid(z / 1.5). Every forward pass has
the best units of each row open and all others shut, gates of 1 and 0; the gradient of a gate is
that of its p. There is no constraint and no multiplier: the masks are what they are to be from the
first step on, and what is exported is what was trained.

The paper spends one budget of parameters on FFN channels and query groups of all layers, greedily,
which leaves layers of different widths (and its guard for empty layers exceeds the budget). Here
the target is a shape, so each row keeps what the shape says, in whatever parts it has to be equal:
all axes can be gated. Its code (ZiY-Wang/GRASPrune at 073dae0) begins with all z at 0, and the
sort decides; here they begin with noise of 0.01. The paper's second pass, which learns a scale of
each unit, is not here: fold gates of another method, or train on.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.shearing.method import straight_through
from megatron_prune.shearing.units import Gated, blocks

TEMPERATURE = 1.5
SPREAD = 0.01


def likelihood(z: Tensor) -> Tensor:
    """p, how likely a unit is to stay."""
    return torch.sigmoid(z / TEMPERATURE)


def projection(p: Tensor, axes: Sequence[Gated]) -> Tensor:
    """The mask of 0 and 1 that opens the likeliest units, as many as the target keeps.

    In each of the `Gated.parts` of a row equally many, as a plan does: heads in every query group,
    others on every rank that the plan is balanced for. Of equal ones the lower index stays.

    Args:
        p: [n] of all gates.
    """
    found = []
    for axis in axes:
        assert axis.keep is not None, "the target is a shape"
        parts = blocks(p, axes)[axis.letter].reshape(axis.rows * axis.parts, -1)
        best = parts.sort(dim=1, descending=True, stable=True).indices
        best = best[:, : axis.keep // axis.parts]
        found.append(torch.zeros_like(parts).scatter_(1, best, 1.0).reshape(-1))
    return torch.cat(found)


class Projected:
    """The method of a run's masks, see `method.MaskMethod`."""

    rates = (1e-2,)
    betas = (0.9, 0.99)
    has_noise = False
    is_exact = True

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        return SPREAD * torch.randn(count, generator=generator)

    def ordered(self, rank: Tensor) -> Tensor:
        """As wide as the noise that masks begin with otherwise, by a criterion's rank."""
        return SPREAD * 4 * (rank - 0.5)

    def drawn(self, a: Tensor, u: Tensor | None, share: float, axes: Sequence[Gated]) -> Tensor:
        p = likelihood(a)
        return straight_through(projection(p.detach(), axes), p)

    def presence(self, a: Tensor, share: float, axes: Sequence[Gated]) -> Tensor:
        return projection(likelihood(a).detach(), axes)

    def score(self, a: Tensor) -> Tensor:
        return likelihood(a)

    def judged(self, a: Tensor) -> Tensor:
        """Those that stay are open, as they were in training."""
        return torch.ones_like(a)

    def bound(self, a: Tensor) -> None:
        pass
