"""What a way of learning masks is, and the table of those there are.

Their names are wanted for ``--help``, so nothing of torch is used while this is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.shearing.units import Gated

MASK_METHODS = {
    "hard-concrete": "hard_concrete:HardConcrete",
    "deterministic": "deterministic:Deterministic",
    "projected": "projected:Projected",
}


@dataclass(frozen=True, kw_only=True)
class MaskRates:
    """Learning rates, of masks and of each multiplier.

    Attributes:
        warmup: steps until they are whole.
        cap: how large the linear multiplier may become, either way; None: without end. While gates
            at the bound hardly answer to it, it grows, and then shuts too much before it is back.
    """

    mask: float
    lagrangian: tuple[float, ...]
    warmup: int = 0
    cap: float | None = None

    def share(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


class MaskMethod(Protocol):
    """How parameters [n] become gates [n]; functions of tensors, without state.

    Attributes:
        rates: default learning rates of masks and of the multipliers, one each; the constraint has
            as many of them, see `Constraint.lagrangian`.
        betas: of Adam, for both.
        has_noise: whether gates are drawn.
        is_exact: whether each step's mask is of the target shape, gates of 0 and 1: there is no
            constraint, and no multiplier.
    """

    rates: tuple[float, ...]
    betas: tuple[float, float]
    has_noise: bool
    is_exact: bool

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Parameters to begin with, float32."""
        ...

    def ordered(self, rank: Tensor) -> Tensor:
        """Parameters to begin with, by rank: 0 for the first to go, 1 for the last."""
        ...

    def drawn(self, a: Tensor, u: Tensor | None, share: float, axes: Sequence[Gated]) -> Tensor:
        """Gates that a microbatch is trained with, differentiable.

        Args:
            u: uniform numbers, None without noise.
            share: of the run that is over.
            axes: whose gates they are.
        """
        ...

    def presence(self, a: Tensor, share: float, axes: Sequence[Gated]) -> Tensor:
        """How likely each unit is to stay, which the constraint sums; differentiable, unless the
        method is exact."""
        ...

    def score(self, a: Tensor) -> Tensor:
        """What decides who stays, 0 or more; higher means keep."""
        ...

    def judged(self, a: Tensor) -> Tensor:
        """Gates to judge with and to export, before those of the lowest score are shut."""
        ...

    def bound(self, a: Tensor) -> None:
        """Keep parameters in bounds after a step, in place."""
        ...


def straight_through(value: Tensor, x: Tensor) -> Tensor:
    """``value``, to the bit, with the gradient of ``x``."""
    return value.detach() + (x - x.detach())


def mask_method(name: str) -> MaskMethod:
    """The method of that name in `MASK_METHODS`."""
    module, _, kind = MASK_METHODS[name].partition(":")
    found: MaskMethod = getattr(importlib.import_module(f"{__package__}.{module}"), kind)()
    return found
