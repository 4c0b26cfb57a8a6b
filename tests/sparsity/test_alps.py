"""ALPS, ADMM and the refit: errors in the paper's order, and the best weights for a mask."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_prune.solve.kselect import ALONE
from megatron_prune.sparsity.method import Asked, How, Inputs, Pattern
from megatron_prune.sparsity.projection import Projection
from megatron_prune.sparsity.refit import normalise, refit, refit_weights
from tests.sparsity.problems import HALF, TWO_OF_FOUR, WAYS, make_problem
from tests.sparsity.ranks import on_ranks

PROBLEM = make_problem()


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("asked", [HALF, Asked(share=0.7), TWO_OF_FOUR], ids=["0.5", "0.7", "2:4"])
def test_errors_are_in_the_papers_order(asked, seed) -> None:
    """Of the layer's outputs: ALPS loses least, then ADMM, SparseGPT, and Wanda."""
    problem = make_problem(seed=seed)
    errors = []
    for way in ("alps", "admm", "sparsegpt", "wanda"):
        found = problem.solved(way, asked)
        errors.append([problem.error(i, each.weight_RI) for i, each in enumerate(found)])
    for better, worse in pairwise(errors):
        assert all(x < 0.95 * y for x, y in zip(better, worse)), errors


def test_nothing_to_prune_gives_the_weights_back() -> None:
    """With P the identity the exact solution is the dense weight; of dead inputs 0."""
    problem = make_problem(dead=False)
    for dense, each in zip(problem.weights, problem.solved("alps", Asked(share=1e-9))):
        torch.testing.assert_close(each.weight_RI, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", [way for way in WAYS if "refit" not in way and way != "alps"])
def test_refit_lowers_the_error_of_any_mask_and_keeps_it(way) -> None:
    found = PROBLEM.solved(way, HALF)
    prepared = normalise(PROBLEM.inputs, 0.01)
    sparse = [each.weight_RI for each in found]
    better = refit_weights(PROBLEM.weights, sparse, prepared, prepared["dead_I"])
    for i, (before, after) in enumerate(zip(sparse, better)):
        assert PROBLEM.error(i, after) < PROBLEM.error(i, before)
        assert (after[before == 0] == 0).all()


def test_refit_comes_to_the_exact_least_squares_of_its_mask() -> None:
    """Each output's own normal equations in float64, after as many steps as there are inputs."""
    moments = normalise(PROBLEM.inputs, 0.01)["moments_II"]
    wanted = PROBLEM.weights[1]
    start = PROBLEM.solved("magnitude", HALF)[1].weight_RI
    found = refit(start, wanted, moments, steps=120)
    exact = torch.zeros_like(wanted, dtype=torch.float64)
    for output in range(len(wanted)):
        kept = start[output] != 0
        right = moments.double()[kept] @ wanted[output].double()
        exact[output, kept] = torch.linalg.solve(moments.double()[kept][:, kept], right)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    ten = refit(start, wanted, moments)
    assert lost(ten, wanted, moments) < 1.05 * lost(exact.float(), wanted, moments)


def lost(found: Tensor, wanted: Tensor, moments: Tensor) -> float:
    rest = (found - wanted).double()
    return float(((rest @ moments.double()) * rest).sum())


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_refit_stays_where_it_is_when_fewer_tokens_than_inputs_say_nothing(tokens, share) -> None:
    """Undamped, so that the moments are singular; the error is that in float64."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 48, generator=generator) * torch.logspace(-1, 1, 48)
    x = x @ (torch.eye(48) + torch.randn(48, 48, generator=generator) / 14)
    inputs = Inputs(windows=1, squares_I=x.square().sum(0).double(), gram_II=x.T @ x)
    prepared = normalise(inputs, 0.0)
    wanted = torch.randn(40, 48, generator=generator) * prepared["scale_I"]
    limit = wanted.abs().kthvalue(int(48 * share) + 1, 1, keepdim=True).values
    start = wanted * (wanted.abs() >= limit)
    found = refit(start, wanted, prepared["moments_II"])
    assert found.norm() < 10 * wanted.norm()
    before, after = (
        ((wanted - w).double() / prepared["scale_I"]) @ x.T.double() for w in (start, found)
    )
    assert after.norm() <= before.norm() * (1 + 1e-5)


def test_refit_asserts_that_the_error_falls() -> None:
    """What is not a second moment has directions in which it rises."""
    moments = -torch.eye(4)
    start, wanted = torch.tensor([[1.0, 0.0, 2.0, 1.0]]), torch.ones(1, 4)
    assert refit(start, wanted, torch.eye(4)).flatten().tolist() == [1, 0, 1, 1]
    skew = torch.eye(4)
    skew[2, 3], skew[3, 2] = -3.0, 3.0
    with pytest.raises(AssertionError, match="error rose"):
        refit(start, wanted, skew)
    assert refit(start, wanted, moments).equal(start)


def test_normalised_moments_have_a_unit_diagonal_and_give_the_same_error() -> None:
    found = normalise(PROBLEM.inputs, 0.01)
    assert found["moments_II"].diagonal().sub(1).abs().max() < 1e-6
    gram = PROBLEM.inputs.gram_II
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
    scale = found["scale_I"]
    torch.testing.assert_close(found["moments_II"] * scale * scale[:, None], damped)


def test_a_projection_drops_the_same_of_equals_at_every_dealing() -> None:
    """Earlier rows first, and in a row the first."""
    dense = torch.ones(4, 6)
    asked = Asked(share=0.5)
    whole = Projection.of(dense, asked, ALONE).goes(dense)
    assert whole.flatten().tolist() == [True] * 12 + [False] * 12
    parts = [dense[:1], dense[1:]]
    ranks = on_ranks(2, lambda d: Projection.of(parts[d.rank], asked, d).goes(parts[d.rank]))
    assert torch.cat(ranks).equal(whole)


def test_a_part_of_a_patterns_zeros_is_the_smallest_of_those_that_would_go() -> None:
    dense = torch.tensor([[1.0, 2.0, 9.0, 8.0, 3.0, 4.0, 5.0, 6.0]])
    projection = Projection.of(dense, TWO_OF_FOUR, ALONE)
    assert projection.goes(dense).flatten().nonzero().flatten().tolist() == [0, 1, 4, 5]
    assert projection.goes(dense, 0.75).flatten().nonzero().flatten().tolist() == [0, 1, 4]
    assert projection.goes(dense, 0.0).sum() == 0


def test_admm_with_one_kept_of_sixteen() -> None:
    asked = Asked(share=15 / 16, pattern=Pattern(keep=1, group=16))
    for i, each in enumerate(make_problem(dead=False).solved("admm", asked)):
        assert (each.weight_RI != 0).view(-1, 16).sum(1).eq(1).all(), i
    assert How().damping == 0.01
