"""SparseGPT against a plain loop of the paper's algorithm 1 in float64; and damping."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_prune.errors import DamagedError
from megatron_prune.solve.kselect import ALONE
from megatron_prune.sparsity.method import How, Pattern, method_for
from megatron_prune.sparsity.obs import factorise
from tests.sparsity.problems import DEAD, HALF, TWO_OF_FOUR, make_problem

PROBLEM = make_problem()


def plain_loop(weight: Tensor, gram: Tensor, windows: int, pattern: Pattern | None) -> Tensor:
    """Algorithm 1, one column after the other, blocks of 40 for thresholds at a half."""
    w, h = weight.double().clone(), gram.double() * 2 / windows
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    goes = torch.zeros_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        step = pattern.group if pattern else 40
        if j % step == 0:
            cost = (w[:, j : j + step] / upper.diagonal()[j : j + step]) ** 2
            if pattern:
                lowest = cost.sort(dim=1, stable=True).indices[:, : step - pattern.keep]
                goes[:, j : j + step].scatter_(1, lowest, True)
            else:
                goes[:, j : j + step] = cost <= cost.flatten().sort().values[cost.numel() // 2]
        error = torch.where(goes[:, j], w[:, j] / upper[j, j], 0.0)
        w -= error[:, None] * torch.where(torch.arange(len(h)) >= j, upper[j], 0.0)
        w[goes[:, j], j] = 0
    return w


@pytest.mark.parametrize("asked", [HALF, TWO_OF_FOUR], ids=["0.5", "2:4"])
def test_it_is_the_papers_loop_with_dead_inputs_and_uneven_blocks(asked) -> None:
    found = PROBLEM.solved("sparsegpt", asked)
    for weight, each in zip(PROBLEM.weights, found):
        wanted = plain_loop(weight, PROBLEM.inputs.gram_II, 16, asked.pattern).float()
        assert (each.weight_RI != 0).equal(wanted != 0)
        torch.testing.assert_close(each.weight_RI, wanted, rtol=1e-4, atol=1e-5)


def test_the_factor_is_that_of_the_inverse() -> None:
    found = factorise(PROBLEM.inputs, How(damping=0.05))
    h = PROBLEM.inputs.gram_II.double() / 8
    h[DEAD, DEAD] = 1
    h += 0.05 * h.diagonal().mean() * torch.eye(len(h))
    wanted = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    torch.testing.assert_close(found["factor_II"].double(), wanted, rtol=1e-4, atol=1e-6)


def test_blocks_do_not_matter_to_patterns() -> None:
    """Groups of 24 are cut by no block of 40, nor by the parts of one."""
    asked = replace(TWO_OF_FOUR, pattern=Pattern(keep=12, group=24))
    results = []
    for size in (1, 40, 128):
        how = How(block_size=size)
        method = method_for("sparsegpt", how)
        prepared = method.prepare(PROBLEM.inputs, how)
        results.append(method.prune(PROBLEM.weights, prepared, asked, how, ALONE)[0].weight_RI)
    for other in results[1:]:
        assert (other != 0).equal(results[0] != 0)
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_damping_is_raised_by_tens_until_there_is_a_factor_and_it_is_told() -> None:
    """Moments with one eigenvalue of -0.03 of the mean: 0.01 is too little, 0.1 is enough."""
    vectors = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(2)))[0]
    values = torch.ones(96)
    values[0] = -0.03
    inputs = replace(PROBLEM.inputs, gram_II=(vectors * values) @ vectors.T)
    with pytest.warns(UserWarning, match="96 inputs .* damping 0.01; it is raised to 0.1$"):
        raised = factorise(inputs, How())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert raised["factor_II"].equal(factorise(inputs, How(damping=0.1))["factor_II"])
    with pytest.warns(UserWarning) as told:
        factorise(inputs, How(damping=0.0))
    assert len(told) == 4  # 0, 0.0001, 0.001, 0.01


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "admm"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_moments_that_are_no_numbers_are_refused(method, wrong) -> None:
    gram = PROBLEM.inputs.gram_II.clone()
    gram[3, 8] = wrong
    with pytest.raises(DamagedError, match="no finite numbers"):
        method_for(method, How()).prepare(replace(PROBLEM.inputs, gram_II=gram), How())


def test_norms_that_are_no_numbers_are_refused() -> None:
    squares = PROBLEM.inputs.squares_I.clone()
    squares[8] = float("inf")
    with pytest.raises(DamagedError, match="no finite numbers"):
        method_for("wanda", How()).prepare(replace(PROBLEM.inputs, squares_I=squares), How())
