"""What a way of learning masks is, and the table of those there are.

Their names are wanted for ``--help``, so nothing of torch is used while this is imported.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Protocol

from megatron_prune.model.lazy import Tensor, torch

MASKS = "masks"  # our key in the training state of a checkpoint
MASK_METHODS = {
    "hard-concrete": "hard_concrete:HardConcrete",
}


@dataclass(frozen=True, kw_only=True)
class MaskRates:
    """Learning rates, of masks and of multipliers; ``warmup`` steps until they are whole."""

    mask: float
    lagrangian: float
    warmup: int = 0

    def share(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


class MaskMethod(Protocol):
    """How parameters [n] become gates [n]; functions of tensors, without state.

    Attributes:
        rates: default learning rates of masks and of the multipliers, one each.
        has_noise: whether gates are drawn.
    """

    rates: tuple[float, ...]
    has_noise: bool

    def start(self, count: int, generator: torch.Generator) -> Tensor:
        """Parameters to begin with, float32."""
        ...

    def ordered(self, rank: Tensor) -> Tensor:
        """Parameters to begin with, by rank: 0 for the first to go, 1 for the last."""
        ...

    def drawn(self, a: Tensor, u: Tensor | None, share: float) -> Tensor:
        """Gates that a microbatch is trained with, differentiable.

        Args:
            u: uniform numbers, None without noise.
            share: of the run that is over.
        """
        ...

    def presence(self, a: Tensor, share: float) -> Tensor:
        """How likely each unit is to stay, which the constraint sums; differentiable."""
        ...

    def judged(self, a: Tensor) -> Tensor:
        """Gates to judge by and to export, before the lowest are shut; higher means keep."""
        ...

    def bound(self, a: Tensor) -> None:
        """Keep parameters in bounds after a step, in place."""
        ...


def mask_method(name: str) -> MaskMethod:
    """The method of that name in `MASK_METHODS`."""
    module, _, kind = MASK_METHODS[name].partition(":")
    found: MaskMethod = getattr(importlib.import_module(f"{__package__}.{module}"), kind)()
    return found
