"""ALPS and ADMM against plain loops of their formulas in float64, with weights as columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from megatron_prune.sparsity.method import Asked
from tests.sparsity.problems import HALF, TWO_OF_FOUR, make_problem

PROBLEM = make_problem(dead=False)
GRAM = PROBLEM.inputs.gram_II.double().numpy()
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


def alps(dense: np.ndarray, keep: Keep) -> np.ndarray:
    """Appendix B.1 of arXiv:2406.07831, and ten steps of its algorithm 2."""
    h = GRAM + 0.01 * GRAM.diagonal().mean() * np.eye(len(GRAM))
    e = np.sqrt(h.diagonal())
    h, b0 = h / np.outer(e, e), dense * e[:, None]
    g = h @ b0
    values, q = np.linalg.eigh(h)
    rho, v, d, started = 0.1, np.zeros_like(b0), b0 * keep(b0), False
    last, k = d != 0, (d != 0).sum()
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
    return b / e[:, None]


def admm(dense: np.ndarray, asked: Asked) -> np.ndarray:
    """Algorithms 1 and 2 of arXiv:2401.02938, with the author's constants."""
    e = np.sqrt(GRAM.diagonal())
    h, w0 = GRAM / np.outer(e, e) + 0.1 * np.eye(len(GRAM)), dense * e[:, None]
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
    for weight, each in zip(PROBLEM.weights, PROBLEM.solved(way, asked)):
        dense = weight.T.double().numpy()
        wanted = (alps(dense, largest(asked)) if way == "alps" else admm(dense, asked)).T
        found = each.weight_RI.numpy()
        assert ((found != 0) == (wanted != 0)).all()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
