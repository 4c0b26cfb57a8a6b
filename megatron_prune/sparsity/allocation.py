"""How many zeros each layer gets, at one share in all.

Uniform; an arithmetic progression over depth; or by how many outliers a layer's scores have (OWL).
Refused is what would leave a layer without zeros or without weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import Tensor, torch

if TYPE_CHECKING:
    from megatron_prune.solve.kselect import Dealt

OUTLIER_MULTIPLE = 5.0  # M of OWL, its section 4
OUTLIER_SPREAD = 0.08  # lambda of OWL


def uniform(share: float, layers: int) -> list[float]:
    """The same share of zeros for every layer."""
    return [share] * layers


def arithmetic(share: float, slope: float, layers: int) -> list[float]:
    """Shares that grow by ``slope`` from layer to layer, with the mean that is asked for.

    ATP (Huang et al. 2025, arXiv:2502.14770, eq. 5): ``share + slope * (l - (layers - 1) / 2)``. A
    positive slope leaves early layers denser; its authors try some nine and take the one with the
    lowest perplexity.

    Raises:
        ConfigError: a slope that is no number, or that is too steep: the message has the bound.
    """
    if not math.isfinite(slope):
        raise ConfigError(f"--sparsity-slope {slope}: wanted a number, such as 0.005")
    shares = [share + slope * (layer - (layers - 1) / 2) for layer in range(layers)]
    if layers > 1:
        most = min(2 * share, 2 * (1 - share)) / (layers - 1)
        _check(
            shares,
            f"--sparsity-slope {slope:g} at --sparsity {share:g}",
            f"take a slope nearer to 0 than {most:.4g}, the bound for {layers} layers",
        )
    return shares


def by_outliers(
    outlier_shares: Sequence[float], share: float, spread: float = OUTLIER_SPREAD
) -> list[float]:
    """OWL: layers whose scores have more outliers keep more.

    Yin et al. 2024, arXiv:2310.05175, section 4, as its code: the layers' shares of outliers are
    brought linearly to [0, 2 spread]; kept is that, less its mean, plus ``1 - share``.

    Args:
        outlier_shares: of each layer, see `outlier_counts`; their unit does not matter.
        spread: lambda, 0 for uniform.

    Raises:
        ConfigError: a spread below 0 or no number, or too large.
    """
    if not 0 <= spread < math.inf:
        raise ConfigError(f"--owl-lambda {spread}: wanted a number, 0 or more, such as 0.08")
    low, high = min(outlier_shares), max(outlier_shares)
    width = high - low
    scaled = [2 * spread * (x - low) / width if width else 0.0 for x in outlier_shares]
    mean = sum(scaled) / len(scaled)
    shares = [share - (x - mean) for x in scaled]
    _check(
        shares,
        f"--owl-lambda {spread:g} at --sparsity {share:g}",
        "take a smaller lambda than that",
    )
    return shares


def outlier_counts(
    metrics: Sequence[Tensor], dealt: Dealt, multiple: float = OUTLIER_MULTIPLE
) -> tuple[int, int]:
    """How many scores of one layer are above ``multiple`` times their mean, and how many there are.

    All matrices of a layer count as one vector. Two sums over ranks, the first in float64, so that
    the mean is the same at every layout but for its last digits.

    Args:
        metrics: this rank's rows of Wanda's score of each of the layer's matrices, float32.
    """
    device = metrics[0].device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for scores in metrics:
        sums[0] += scores.sum(dtype=torch.float64)
        sums[1] += scores.numel()
    total, size = dealt.total(sums).tolist()
    threshold = multiple * total / size
    above = torch.zeros(1, dtype=torch.int64, device=device)
    for scores in metrics:
        above += (scores > threshold).count_nonzero()
    return int(dealt.total(above)), int(size)


def _check(shares: Sequence[float], what: str, then: str) -> None:
    for layer, share in enumerate(shares):
        if not 0 < share < 1:
            raise ConfigError(
                f"{what}: layer {layer} would have a share of zeros of {share:.4g}, wanted more "
                f"than 0 and less than 1; {then}"
            )
