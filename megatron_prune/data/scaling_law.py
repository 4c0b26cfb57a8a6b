"""What loss a model of another size would have: a power law through a few measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_prune.errors import ConfigError

_EXPONENTS = np.geomspace(1e-3, 4.0, 400)  # measured ones lie between 0.05 and 0.5
_POINTS_MIN = 3  # as many as the law has unknowns


@dataclass(frozen=True, kw_only=True)
class ScalingLaw:
    """``L(N) = E + A (N / N0)^-alpha``, eq. 1 of Hoffmann et al. 2022, arXiv:2203.15556, in N."""

    irreducible: float
    factor: float
    exponent: float
    reference: float  # N0

    def loss(self, parameters: float) -> float:
        return self.irreducible + self.factor * (parameters / self.reference) ** -self.exponent


def fit_scaling_law(points: Sequence[tuple[float, float]], where: str) -> ScalingLaw:
    """The law with the least squared error, E and A not negative.

    For a given alpha the best E and A have a closed form; alpha is searched on a grid that closes
    in on the best one.

    Args:
        points: (parameters, loss) of each measured model.
        where: what messages begin with.

    Raises:
        ConfigError: fewer than three sizes, a number that is not positive, or losses that do not
            fall with size.
    """
    for parameters, loss in points:
        if not all(math.isfinite(value) and value > 0 for value in (parameters, loss)):
            raise ConfigError(
                f"{where}: parameters {parameters:g}, loss {loss:g}; wanted positive numbers"
            )
    sizes = sorted({parameters for parameters, _ in points})
    if len(sizes) < _POINTS_MIN:
        raise ConfigError(
            f"{where}: losses of {len(sizes)} model sizes; a scaling law has three unknowns: give "
            f"{_POINTS_MIN} sizes or more, or a target"
        )
    reference = sizes[0]
    x = np.array([parameters / reference for parameters, _ in points], dtype=np.float64)
    y = np.array([loss for _, loss in points], dtype=np.float64)
    grid = _EXPONENTS
    for _ in range(12):  # each narrows the grid two hundredfold, down to rounding
        errors = [_solve(x**-alpha, y)[2] for alpha in grid]
        at = int(np.argmin(errors))
        best = float(grid[at])
        grid = np.linspace(grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)], len(grid))
        if grid[0] == grid[-1]:
            break
    irreducible, factor, _ = _solve(x**-best, y)
    if factor <= 0:
        raise ConfigError(
            f"{where}: the losses do not fall as models grow, so that no scaling law fits; look at "
            "the numbers, or give a target"
        )
    return ScalingLaw(irreducible=irreducible, factor=factor, exponent=best, reference=reference)


def _solve(z: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float, float]:
    """The E, A >= 0 with the least sum of squares of ``E + A z - y``, and that sum."""
    centred = z - z.mean()
    factor = float(centred @ y / (centred @ centred))
    irreducible = float(y.mean() - factor * z.mean())
    if irreducible < 0:
        irreducible, factor = 0.0, float(z @ y / (z @ z))
    if factor < 0:
        irreducible, factor = float(y.mean()), 0.0
    residual = irreducible + factor * z - y
    return irreducible, factor, float(residual @ residual)
