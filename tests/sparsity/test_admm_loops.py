"""ALPS and ADMM against plain loops of their formulas in float64, with weights as columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_prune.sparsity.method import Asked, Inputs
from tests.sparsity.problems import HALF, TWO_OF_FOUR, Problem, make_problem

PROBLEM = make_problem(dead=False)
Keep = Callable[[np.ndarray], np.ndarray]


def largest(asked: Asked) -> Keep:
    """The mask of what stays of a matrix [I, O]."""

    def keep(b: np.ndarray) -> np.ndarray:
        if asked.pattern is None:
            kept = np.zeros(b.size, dtype=bool)
            kept[np.argsort(np.abs(b).ravel())[b.size - round(b.size * (1 - asked.share)) :]] = True
            return kept.reshape(b.shape)
        groups = np.abs(b).reshape(-1, asked.pattern.group, b.shape[1])
        place = groups.argsort(1).argsort(1)
        return (place >= asked.pattern.group - asked.pattern.keep).reshape(b.shape)

    return keep


def alps(dense: np.ndarray, gram: np.ndarray, keep: Keep) -> tuple[np.ndarray, int]:
    """Appendix B.1 of arXiv:2406.07831, and ten steps of its algorithm 2; and how often it starts
    anew."""
    h = gram + 0.01 * gram.diagonal().mean() * np.eye(len(gram))
    e = np.sqrt(h.diagonal())
    h, b0 = h / np.outer(e, e), dense * e[:, None]
    g = h @ b0
    values, q = np.linalg.eigh(h)
    rho, v, d, started = 0.1, np.zeros_like(b0), b0 * keep(b0), False
    last, k, restarts = d != 0, (d != 0).sum(), 0
    for i in range(300):
        b = q @ ((q.T @ (g - v + rho * d)) / (values[:, None] + rho))
        d = (b + v / rho) * keep(b + v / rho)
        v = v + rho * (b - d)
        if (i + 1) % 3:
            continue
        changed, last = ((d != 0) != last).sum(), d != 0
        if changed / k > 0.1:
            rho, started = rho * 1.3, True
        elif changed / k > 0.005:
            rho, started = rho * 1.2, True
        elif changed and started:
            rho *= 1.1
        elif changed:
            rho, d, v = rho / 5, b0 * keep(b0), np.zeros_like(b0)
            restarts += 1
        elif started:
            break
        else:
            rho /= 5
        if i >= 30 and changed / k < 3e-4:
            break
    kept = keep(b)
    b = b * kept
    r = (g - h @ b) * kept
    p = r
    for _ in range(10):
        t = h @ p
        a = (r * r).sum(0) / ((p * t).sum(0) + 1e-300)  # outputs may have no weights left
        b, new = b + a * p, (r - a * t) * kept
        p, r = new + (new * new).sum(0) / ((r * r).sum(0) + 1e-300) * p, new
    return b / e[:, None], restarts


def admm(dense: np.ndarray, gram: np.ndarray, asked: Asked) -> np.ndarray:
    """Algorithms 1 and 2 of arXiv:2401.02938, with the author's constants."""
    e = np.sqrt(gram.diagonal())
    h, w0 = gram / np.outer(e, e) + 0.1 * np.eye(len(gram)), dense * e[:, None]
    inverse, xy = np.linalg.inv(h + np.eye(len(h))), h @ w0
    w, u = w0, np.zeros_like(w0)
    for i in range(20):
        z = w + u
        if i < 15:
            kept = largest(asked)(z)
            if asked.pattern is not None:
                going = asked.share * (1 - (1 - (i + 1) / 15) ** 3)
                keys = np.where(kept, np.inf, np.abs(z)).ravel()
                kept = np.ones(z.size, dtype=bool)
                kept[np.argsort(keys)[: round(z.size * going)]] = False
                kept = kept.reshape(z.shape)
        u = u + w - z * kept
        w = inverse @ (xy + z * kept - u)
    return (w + u) * kept / e[:, None]


@pytest.mark.parametrize("asked", [HALF, Asked(share=0.8), TWO_OF_FOUR], ids=["0.5", "0.8", "2:4"])
@pytest.mark.parametrize("way", ["alps", "admm"])
def test_it_is_the_plain_loop(way, asked) -> None:
    gram = PROBLEM.inputs.gram_II.double().numpy()
    for weight, each in zip(PROBLEM.weights, PROBLEM.solved(way, asked)):
        dense = weight.T.double().numpy()
        if way == "alps":
            wanted, _ = alps(dense, gram, largest(asked))
        else:
            wanted = admm(dense, gram, asked)
        assert_alike(each.weight_RI, wanted.T)


@pytest.mark.parametrize(("low", "restarts"), [(0.3, 1), (0.1, 7)])
def test_it_starts_anew_when_the_penalty_lets_next_to_nothing_move(low, restarts) -> None:
    """Inputs that hardly hang together, weights that are large or small, and eight in between."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.eye(96) + 0.1 * torch.randn(96, 96, generator=draw) / 96**0.5
    x = torch.randn(4000, 96, generator=draw) @ mix
    weight = torch.randn(48, 96, generator=draw).sign()
    weight *= 1 + 0.2 * torch.rand(48, 96, generator=draw)
    weight[:, ::2] *= low
    weight[0, :8] = torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.45])
    gram = x.T @ x
    inputs = Inputs(windows=16, squares_I=gram.diagonal().double() / 16, gram_II=gram)
    dense = weight.T.double().numpy()
    wanted, restarted = alps(dense, gram.double().numpy(), largest(HALF))
    assert restarted >= restarts
    found = Problem(weights=[weight], inputs=inputs).solved("alps", HALF)[0].weight_RI
    assert_alike(found, wanted.T)


def assert_alike(found: Tensor, wanted: np.ndarray) -> None:
    assert ((found.numpy() != 0) == (wanted != 0)).all()
    most = float(np.abs(wanted).max())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3 * most)
