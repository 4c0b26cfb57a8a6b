"""Least squares from moments, against torch's own solver on the tokens themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_prune.errors import ConfigError
from megatron_prune.solve.least_squares import Affine, Moments, fit, norm_ratio, relative_error

TOKENS, INPUTS, OUTPUTS = 200, 12, 7
KEPT = torch.tensor([0, 2, 3, 7, 8, 11])


@pytest.fixture
def data() -> tuple[Tensor, Tensor, Tensor]:
    """Correlated inputs with a mean, a weight and a bias, float64."""
    draw = torch.Generator().manual_seed(0)
    new = {"generator": draw, "dtype": torch.float64}
    mix = torch.randn(INPUTS, INPUTS, **new)
    x = torch.randn(TOKENS, INPUTS, **new) @ mix + 2 * torch.randn(INPUTS, **new)
    return x, torch.randn(OUTPUTS, INPUTS, **new), torch.randn(OUTPUTS, **new)


def moments(x: Tensor, y: Tensor) -> Moments:
    return Moments(
        count=len(x),
        gram_KK=x.T @ x,
        cross_DK=y.T @ x,
        input_sum_K=x.sum(0),
        target_sum_D=y.sum(0),
        target_square=float(y.square().sum()),
    )


def ridge(x: Tensor, y: Tensor, weight: Tensor, damping: float) -> Tensor:
    """The same problem as rows of one least squares: sqrt(lam) W' = sqrt(lam) W below the data."""
    root = (damping * (x.T @ x).diagonal().mean()).sqrt()
    rows = torch.cat([x, root * torch.eye(x.shape[1], dtype=x.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([y, root * weight.T])).solution.T


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_without_a_bias_it_is_ridge_regression_towards_the_kept_weights(data, damping) -> None:
    x, weight, _ = data
    xk, y, kept = x[:, KEPT], x @ weight.T, weight[:, KEPT]
    found = fit(moments(xk, y), Affine(weight_DK=kept, bias_D=None), damping)
    torch.testing.assert_close(found.weight_DK, ridge(xk, y, kept, damping))
    assert found.bias_D is None


@pytest.mark.parametrize("damping", [0.0, 1e-3, 0.5])
def test_a_bias_takes_up_the_mean(data, damping) -> None:
    x, weight, bias = data
    xk, y, kept = x[:, KEPT], x @ weight.T + bias, weight[:, KEPT]
    found = fit(moments(xk, y), Affine(weight_DK=kept, bias_D=bias), damping)
    wanted = ridge(xk - xk.mean(0), y - y.mean(0), kept, damping)
    torch.testing.assert_close(found.weight_DK, wanted)
    torch.testing.assert_close(found.bias_D, y.mean(0) - wanted @ xk.mean(0))


def test_undamped_it_is_the_papers_formula(data) -> None:
    """W C[:,kept] C[kept,kept]^-1."""
    x, weight, _ = data
    c = x.T @ x
    wanted = weight @ c[:, KEPT] @ torch.linalg.inv(c[KEPT][:, KEPT])
    kept = Affine(weight_DK=weight[:, KEPT], bias_D=None)
    found = fit(moments(x[:, KEPT], x @ weight.T), kept, 0.0)
    torch.testing.assert_close(found.weight_DK, wanted)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_relative_error_is_that_of_the_tokens(data, with_bias) -> None:
    x, weight, bias = data
    xk, y = x[:, KEPT], x @ weight.T + bias
    given = Affine(weight_DK=weight[:, KEPT], bias_D=bias if with_bias else None)
    out = xk @ given.weight_DK.T + (bias if with_bias else 0)
    wanted = float((y - out).norm() / y.norm())
    assert relative_error(moments(xk, y), given) == pytest.approx(wanted)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("damping", [0.0, 1e-2, 1.0, 1e4])
def test_it_is_never_worse_than_the_kept_weights_whatever_the_damping(
    data, damping, with_bias
) -> None:
    x, weight, bias = data
    found = moments(x[:, KEPT], x @ weight.T + (bias if with_bias else 0))
    kept = Affine(weight_DK=weight[:, KEPT], bias_D=bias if with_bias else None)
    before, after = relative_error(found, kept), relative_error(found, fit(found, kept, damping))
    assert after <= before
    assert damping > 1 or after < 0.95 * before  # the control: it does do something
    # pulled towards zero instead, heavy damping makes it worse
    zero = Affine(weight_DK=torch.zeros_like(kept.weight_DK), bias_D=None)
    assert damping < 1e4 or with_bias or relative_error(found, fit(found, zero, damping)) > before


@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_where_nothing_is_lost_nothing_changes(data, damping) -> None:
    x, weight, bias = data
    for b in (None, bias):
        y = x @ weight.T + (0 if b is None else b)
        found = fit(moments(x, y), Affine(weight_DK=weight, bias_D=b), damping)
        torch.testing.assert_close(found.weight_DK, weight)
        assert b is None or torch.allclose(found.bias_D, b)


def test_dependent_inputs_without_damping_are_refused_and_damped_ones_are_not(data) -> None:
    x, weight, _ = data
    x = x[:, KEPT].clone()
    x[:, 1] = 0
    found = moments(x, x @ weight[:, KEPT].T)
    kept = Affine(weight_DK=weight[:, KEPT], bias_D=None)
    with pytest.raises(ConfigError, match="6 kept inputs are linearly dependent over 200 tokens"):
        fit(found, kept, 0.0)
    assert fit(found, kept, 1e-3).weight_DK.isfinite().all()


@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_inputs_that_are_all_zero_leave_the_weights_and_the_bias_takes_up_the_mean(
    data, damping
) -> None:
    x, weight, bias = data
    found = moments(torch.zeros(TOKENS, len(KEPT), dtype=torch.float64), x @ weight.T)
    for b in (None, bias):
        kept = Affine(weight_DK=weight[:, KEPT], bias_D=b)
        fitted = fit(found, kept, damping)
        assert torch.equal(fitted.weight_DK, kept.weight_DK)
        if b is not None and fitted.bias_D is not None:
            torch.testing.assert_close(fitted.bias_D, (x @ weight.T).mean(0))
        assert (fitted.bias_D is None) == (b is None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen(data, value) -> None:
    x, weight, _ = data
    assert moments(x, x @ weight.T).is_finite
    x[3, 4] = value
    assert not moments(x, x.nan_to_num(0, 0) @ weight.T).is_finite
    y = x.nan_to_num(0, 0) @ weight.T
    y[2, 2] = value
    assert not moments(x.nan_to_num(0, 0), y).is_finite


def test_the_ratio_of_a_norm_by_hand() -> None:
    """x = (1, 1, 1, 3): rms sqrt(3), e = (1/3, 1/3, 1/3, 3). Without the last, rms is 1."""
    energy = torch.tensor([1 / 3, 1 / 3, 1 / 3, 3.0])
    assert norm_ratio(energy, torch.tensor([0, 1, 2])) == pytest.approx(3**-0.5)
    assert norm_ratio(energy, torch.tensor([3])) == pytest.approx(3**0.5)
    assert norm_ratio(energy, None) == 1.0


def test_the_ratio_counts_the_norms_epsilon_on_both_sides() -> None:
    """x = (1, 1, 1, 3) and epsilon 1: the root goes from sqrt(3 + 1) to sqrt(1 + 1)."""
    energy = torch.tensor([1.0, 1.0, 1.0, 9.0]) / 4
    assert norm_ratio(energy, torch.tensor([0, 1, 2])) == pytest.approx(2**-0.5)
    assert norm_ratio(energy, torch.arange(4)) == pytest.approx(1.0)
