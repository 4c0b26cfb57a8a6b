"""Shares of zeros by layer."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.errors import ConfigError
from megatron_prune.solve.kselect import ALONE
from megatron_prune.sparsity.allocation import arithmetic, by_outliers, outlier_counts, uniform
from tests.sparsity.ranks import on_ranks, split_rows


def test_uniform() -> None:
    assert uniform(0.3, 2) == [0.3, 0.3]


def test_an_arithmetic_progression_has_the_mean_that_is_asked_for() -> None:
    shares = arithmetic(0.5, 0.02, 4)
    assert shares == pytest.approx([0.47, 0.49, 0.51, 0.53])
    assert arithmetic(0.7, 0.3, 1) == [0.7]
    assert arithmetic(0.7, -0.1, 2) == pytest.approx([0.75, 0.65])


@pytest.mark.parametrize(("share", "slope", "layer"), [(0.7, 0.3, 2), (0.3, 0.3, 0), (0.3, -1, 0)])
def test_a_slope_that_is_too_steep_is_refused_with_its_bound(share, slope, layer) -> None:
    with pytest.raises(ConfigError, match=f"slope {slope} at .* layer {layer} .* than 0.3, the b"):
        arithmetic(share, slope, 3)
    assert all(0 < x < 1 for x in arithmetic(share, 0.299, 3))
    with pytest.raises(ConfigError, match="slope nan: wanted a number"):
        arithmetic(share, float("nan"), 3)


def test_outliers_move_zeros_to_other_layers() -> None:
    shares = by_outliers([4.0, 1.0, 2.0], 0.7, 0.06)
    assert shares == pytest.approx([0.7 - 0.12 + 0.16 / 3, 0.7 + 0.16 / 3, 0.7 - 0.04 + 0.16 / 3])
    assert sum(shares) / 3 == pytest.approx(0.7)
    assert by_outliers([2.0, 2.0], 0.7) == [0.7, 0.7]
    assert max(by_outliers([1, 2], 0.5)) - min(by_outliers([1, 2], 0.5)) == pytest.approx(0.16)


def test_a_spread_that_empties_a_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="lambda 0.3 at --sparsity 0.75: layer 1 .* of 1.05,"):
        by_outliers([2.0, 1.0], 0.75, 0.3)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ConfigError, match="wanted a number, 0 or more"):
            by_outliers([2.0, 1.0], 0.75, wrong)


def test_outliers_are_counted_over_all_matrices_and_ranks_of_a_layer() -> None:
    draw = torch.Generator().manual_seed(0)
    layer = [torch.randn(8, 30, generator=draw).square(), torch.randn(3, 50, generator=draw).abs()]
    flat = torch.cat([x.flatten() for x in layer])
    wanted = (int((flat > 5 * flat.mean()).sum()), flat.numel())
    assert wanted[0] > 0 and outlier_counts(layer, ALONE) == wanted
    parts = [split_rows(layer[0], [0, 5, 3]), split_rows(layer[1], [1, 2, 0])]
    counted = on_ranks(3, lambda d: outlier_counts([part[d.rank] for part in parts], d))
    assert counted == [wanted] * 3
