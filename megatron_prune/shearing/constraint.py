"""The constraint that learned masks are trained under: a Lagrangian towards a shape or a size.

Of every axis with a target (Xia et al. 2023, arXiv:2310.06694, section 2.1): the mean over its rows
of ``l1 (s - t) + l2 (s - t)^2``, where s is a row's expected sparsity and t its target, which rises
in a line. So each layer has to meet the target, and all share one pair of multipliers. The
multipliers begin at 0 and rise by the gradient. The paper states the target on counts; the official
code, followed here, on shares. Methods without noise add ``l3 mean s (1 - s)``, which is 0 when all
gates have decided (Huang et al. 2026, arXiv:2603.08065).

Without a shape (CoFi: Xia et al. 2022, arXiv:2204.00408) there is one pair, and s is the share of
the model's parameters that is expected to go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelShape
from megatron_prune.shearing.units import Gated, expected_parameters

PARAMETERS = "parameters"  # what the constraint on the size is called


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """How the targets rise: from ``start`` to the target, in a line over ``steps`` steps."""

    start: float = 0.0
    steps: int = 0

    def target(self, final: float, step: int) -> float:
        """The target of a step, counted from 0."""
        share = min(1.0, step / self.steps) if self.steps else 1.0
        return (final - self.start) * share + self.start


@dataclass(frozen=True, kw_only=True)
class Size:
    """A target for the whole model.

    Attributes:
        target: the share of the parameters that is to go.
        layer, outer: axes of its weights, see `expected_parameters`.
    """

    target: float
    shape: ModelShape
    layer: tuple[str, ...]
    outer: tuple[str, ...]

    def sparsity(self, present: Mapping[str, Tensor]) -> Tensor:
        """[1] the share that is expected to go."""
        of = self.shape, self.layer, self.outer
        return (1 - expected_parameters(present, *of) / expected_parameters({}, *of)).view(1)


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """What the gates are held to.

    Attributes:
        size: the target of the whole model, None where the axes have targets of their own.
    """

    axes: tuple[Gated, ...]
    warmup: Warmup
    size: Size | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """What is held: the axes' words, or `PARAMETERS`."""
        return tuple(axis.word for axis in self.axes) if self.size is None else (PARAMETERS,)

    @property
    def final(self) -> tuple[float, ...]:
        """Targets once they have risen."""
        if self.size is not None:
            return (self.size.target,)
        return tuple(axis.target for axis in self.axes)

    def targets(self, step: int) -> list[float]:
        return [self.warmup.target(final, step) for final in self.final]

    def sparsities(self, present: Mapping[str, Tensor]) -> list[Tensor]:
        """Of all that is held, [rows] each: the expected share of units that are shut.

        Args:
            present: axis letter -> [rows, size], how likely each unit is to stay.
        """
        if self.size is not None:
            return [self.size.sparsity(present)]
        return [1 - present[axis.letter].mean(1) for axis in self.axes]

    def undecided(self, present: Mapping[str, Tensor]) -> list[Tensor]:
        """Of all that is held, []: the mean of s (1 - s) over its gates, over axes alike."""
        means = [(present[axis.letter] * (1 - present[axis.letter])).mean() for axis in self.axes]
        return means if self.size is None else [torch.stack(means).mean()]

    def lagrangian(
        self, present: Mapping[str, Tensor], lambdas: Tensor | Sequence[Tensor], step: int
    ) -> Tensor:
        """[] what the gates lower and the multipliers raise.

        Args:
            lambdas: two or three, each [n]: the linear, the quadratic one, and that of gates that
                are undecided, of all that is held.
        """
        linear, quadratic, *third = lambdas
        terms = [
            (l1 * (s - t) + l2 * (s - t).square()).mean()
            for s, t, l1, l2 in zip(self.sparsities(present), self.targets(step), linear, quadratic)
        ]
        for row in third:
            terms += [l3 * u for l3, u in zip(row, self.undecided(present))]
        return torch.stack(terms).sum()


def without_lowest(values: Tensor, gone: Sequence[int], scores: Tensor | None = None) -> Tensor:
    """Gates of which each row's lowest are shut.

    Args:
        values: [rows, size].
        gone: how many of each row.
        scores: [rows, size] what is low (default: ``values``); of equal ones the later goes first.
    """
    order = (values if scores is None else scores).sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(values.shape[1], device=values.device).expand_as(order)
    stays = place < (values.shape[1] - torch.tensor(gone, device=values.device))[:, None]
    kept = torch.zeros_like(stays).scatter_(1, order, stays)
    return values * kept
