"""Gates without noise: the paper's formulas in plain loops, gradients by differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.shearing import deterministic
from megatron_prune.shearing.constraint import Constraint, Size, Warmup
from megatron_prune.shearing.deterministic import Deterministic
from megatron_prune.shearing.masks import Masks
from megatron_prune.shearing.method import MaskRates
from megatron_prune.shearing.units import Gated
from tests.shearing.shapes import AXES, SHAPE

GRID = torch.linspace(-0.1, 1.3, 57, dtype=torch.float64)
SHARES = (0.0, 0.04, 0.5, 1.0)


def _soft(m: float, mu: float) -> float:
    """Of a gate, before the clamp."""
    return 1.2 / (1 + math.exp(-2.4 / mu * (m - mu))) - 0.1


def _counted(z: float, share: float) -> float:
    return min(1.0, max(0.0, _soft(max(z, 0.0), 0.5 - 0.45 * math.sqrt(share))))


@pytest.mark.parametrize("share", SHARES)
def test_gates_and_what_they_count(share: float) -> None:
    gates, counted = deterministic.opened(GRID), deterministic.presence(GRID, share)
    for z, gate, s in zip(GRID.tolist(), gates.tolist(), counted.tolist()):
        assert gate == max(z, 0.0)
        assert s == pytest.approx(_counted(z, share), abs=1e-12)
    assert counted[0] == 0 and counted[-1] == 1
    assert float(gates.max()) > 1, "a gate may exceed 1"


def test_what_counts_as_open_changes_during_a_run() -> None:
    """A control: a gate of 0.3 is mostly shut at first and open at last."""
    counted = [float(deterministic.presence(torch.tensor(0.3), share)) for share in SHARES]
    assert counted[0] < 0.25 and counted[-1] == 1
    assert counted == sorted(counted)


@pytest.mark.parametrize("share", SHARES)
def test_gradients_pass_straight_through(share: float) -> None:
    """Those of the functions without ReLU and clamp; the clamped ones would be 0 in places."""
    z = GRID.clone().requires_grad_()
    (of_gates,) = torch.autograd.grad(deterministic.opened(z).sum(), z)
    assert torch.equal(of_gates, torch.ones_like(z))
    (found,) = torch.autograd.grad(deterministic.presence(z, share).sum(), z)
    mu, step, clamped = 0.5 - 0.45 * math.sqrt(share), 1e-6, 0
    for z_, slope in zip(GRID.tolist(), found.tolist()):
        m = max(z_, 0.0)
        around = [_soft(m + d, mu) for d in (step, -step)]
        assert slope == pytest.approx((around[0] - around[1]) / (2 * step), rel=1e-5, abs=1e-8)
        is_flat = _counted(z_ + step, share) == _counted(z_ - step, share)
        clamped += is_flat and slope > 1e-3
    assert clamped > 3, "nothing was clamped: the case shows nothing"


def _present(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        axis.letter: torch.rand(
            axis.rows, axis.size, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for axis in AXES
    }


def _lambdas(words: int) -> Tensor:
    found = torch.arange(1, 3 * words + 1, dtype=torch.float64).view(3, words) / 7
    return found.requires_grad_()


def test_the_third_multiplier_makes_gates_decide() -> None:
    """l1 (s - t) + l2 (s - t)^2 by row and l3 s (1 - s) by gate, each a mean."""
    present, lambdas = _present(), _lambdas(len(AXES))
    held = Constraint(axes=AXES, warmup=Warmup(steps=4))
    total = held.lagrangian(present, lambdas, 3)
    wanted, rises = 0.0, []
    for axis, (l1, l2, l3) in zip(AXES, lambdas.t().tolist()):
        p, t = present[axis.letter].tolist(), axis.target * 3 / 4
        gone = [1 - sum(row) / len(row) for row in p]
        linear = sum(s - t for s in gone) / len(gone)
        quadratic = sum((s - t) ** 2 for s in gone) / len(gone)
        undecided = sum(x * (1 - x) for row in p for x in row) / (axis.rows * axis.size)
        wanted += l1 * linear + l2 * quadratic + l3 * undecided
        rises.append((linear, quadratic, undecided))
    assert float(total) == pytest.approx(wanted, rel=1e-12)
    (found,) = torch.autograd.grad(total, lambdas, retain_graph=True)
    assert torch.allclose(found.t(), torch.tensor(rises, dtype=torch.float64), atol=1e-12)
    without = held.lagrangian(present, lambdas[:2], 3)
    assert abs(float(total - without)) > 0.1


def test_of_a_size_the_third_term_counts_all_axes_alike() -> None:
    present, lambdas = _present(), _lambdas(1)
    size = Size(target=0.4, shape=SHAPE, layer=("QD", "DF"), outer=("VD",))
    axes = tuple(replace(axis, keep=None) for axis in AXES)
    held = Constraint(axes=axes, warmup=Warmup(), size=size)
    (found,) = torch.autograd.grad(held.lagrangian(present, lambdas, 0), lambdas)
    means = [float((x * (1 - x)).mean()) for x in present.values()]
    assert float(found[2, 0]) == pytest.approx(sum(means) / len(means), rel=1e-12)


def _masks(steps: int, **rates: Any) -> Masks:
    held = Constraint(axes=AXES, warmup=Warmup(steps=2))
    mask, *multipliers = Deterministic.rates
    given = MaskRates(**{"mask": mask, "lagrangian": tuple(multipliers), **rates})
    return Masks("deterministic", held, given, 3, steps)


class _Adam:
    """Of one number, by hand; ``sign`` -1 goes up."""

    def __init__(self, lr: float, sign: int) -> None:
        self.lr, self.sign, self.m, self.v, self.t = lr, sign, 0.0, 0.0, 0

    def step(self, x: float, grad: float) -> float:
        self.t += 1
        grad *= self.sign
        self.m, self.v = 0.9 * self.m + 0.1 * grad, 0.999 * self.v + 0.001 * grad * grad
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return x - self.lr * m / (math.sqrt(v) + 1e-8)


def test_steps_are_those_of_a_plain_loop() -> None:
    """Gates down at 0.02, multipliers up at 0.02, 0.4 and 0.02, on a loss of its own; z >= -0.1."""
    steps, masks = 30, _masks(30)
    places = [(axis, row, i) for axis in AXES for row in range(axis.rows) for i in range(axis.size)]
    cost = torch.linspace(-0.5, 2.0, len(places))
    z = masks.parameters.tolist()
    assert 0.95 < min(z) < max(z) < 1.05 and len(set(z)) == len(z)
    adam = [_Adam(2e-2, 1) for _ in z]
    lambdas = [[0.0] * len(AXES) for _ in range(3)]
    rising = [[_Adam(lr, -1) for _ in AXES] for lr in (2e-2, 4e-1, 2e-2)]
    for step in range(steps):
        gates = masks.drawn(step, 0)
        assert gates.tolist() == pytest.approx([max(x, 0.0) for x in z], abs=1e-4)
        (given,) = torch.autograd.grad((cost * gates).sum(), masks.parameters)
        masks.constrain(given, step)
        masks.step(step, 1.0, 1.0)
        z, lambdas = _step_by_hand(z, lambdas, cost.tolist(), step, steps, adam, rising)
    assert masks.parameters.tolist() == pytest.approx(z, abs=2e-4)
    assert masks.lambdas.tolist()[0] == pytest.approx(lambdas[0], abs=1e-3)
    assert masks.lambdas.tolist()[1] == pytest.approx(lambdas[1], rel=1e-3)
    assert masks.lambdas.tolist()[2] == pytest.approx(lambdas[2], abs=1e-3)
    assert min(z) < 0.5 and max(z) > 1.3, "the loop moved nothing"


def _step_by_hand(
    z: list[float],
    lambdas: list[list[float]],
    cost: list[float],
    step: int,
    steps: int,
    adam: list[_Adam],
    rising: list[list[_Adam]],
) -> tuple[list[float], list[list[float]]]:
    mu = 0.5 - 0.45 * math.sqrt(step / steps)
    grads, found, first = list(cost), [list(row) for row in lambdas], 0
    for number, axis in enumerate(AXES):
        t, n = axis.target * min(1.0, step / 2), axis.rows * axis.size
        l1, l2, l3 = (row[number] for row in lambdas)
        sums = [0.0, 0.0, 0.0]
        for row in range(axis.rows):
            mine = range(first + row * axis.size, first + (row + 1) * axis.size)
            s = {i: _counted(z[i], step / steps) for i in mine}
            gone = 1 - sum(s.values()) / axis.size
            sums[0] += (gone - t) / axis.rows
            sums[1] += (gone - t) ** 2 / axis.rows
            for i in mine:
                sums[2] += s[i] * (1 - s[i]) / n
                q = (_soft(max(z[i], 0.0), mu) + 0.1) / 1.2
                slope = 1.2 * q * (1 - q) * 2.4 / mu
                by_s = -(l1 + 2 * l2 * (gone - t)) / n + l3 * (1 - 2 * s[i]) / n
                grads[i] += by_s * slope
        first += n
        for which in range(3):
            moved = rising[which][number].step(lambdas[which][number], sums[which])
            found[which][number] = moved
    return [max(-0.1, one.step(x, g)) for one, x, g in zip(adam, z, grads)], found


def test_a_shut_gate_goes_no_lower_and_comes_back() -> None:
    masks = _masks(100)
    down = torch.full_like(masks.parameters, 1e3)
    for step in range(80):
        masks.constrain(down, step)
        masks.step(step, 1.0, 1.0)
    assert torch.equal(masks.parameters.detach(), torch.full_like(down, -0.1))
    assert float(masks.drawn(80, 0).abs().max()) == 0
    gates = masks.drawn(80, 0)
    (back,) = torch.autograd.grad(gates.sum(), masks.parameters)
    assert torch.equal(back, torch.ones_like(back))


def test_scores_order_what_the_gates_no_longer_do() -> None:
    z = torch.tensor([-0.1, -0.05, 0.0, 0.4, 1.2])
    method = Deterministic()
    assert method.judged(z).tolist() == pytest.approx([0, 0, 0, 0.4, 1.2])
    scores = method.score(z).tolist()
    assert scores[0] >= 0 and scores == sorted(set(scores))


def test_masks_start_in_the_order_of_scores() -> None:
    ranks = {a.letter: torch.rand(a.rows, a.size) for a in AXES}
    masks = _masks(10)
    masks.order_by(ranks)
    for letter, x in masks.by_axis(masks.parameters.detach()).items():
        assert torch.equal(x.argsort(dim=1), ranks[letter].argsort(dim=1))
        assert float((x - 1).abs().max()) <= 0.02


def test_state_continues_to_the_bit() -> None:
    whole, half = _masks(10), _masks(10)
    steps = [torch.linspace(-1, 1, len(whole.parameters)) * n for n in range(6)]

    def run(masks: Masks, first: int, last: int) -> None:
        for step in range(first, last):
            masks.constrain(steps[step].clone(), step)
            masks.step(step, 1.0, 0.5)

    run(whole, 0, 6)
    run(half, 0, 3)
    again = _masks(10)
    again.load(half.state())
    run(again, 3, 6)
    assert torch.equal(again.parameters, whole.parameters)
    assert torch.equal(again.lambdas, whole.lambdas)
    started = _masks(10)
    run(started, 3, 6)
    assert not torch.equal(started.parameters, whole.parameters)


def test_after_the_last_step_the_last_mu_counts() -> None:
    """Also of masks that are judged only, which know no number of steps."""
    masks = _masks(10)
    at_rest = Masks.at_rest("deterministic", AXES, masks.state())
    for letter, p in masks.present(10).items():
        assert torch.equal(p, at_rest.present(10)[letter])
    z = {**masks.state(), "parameters": torch.full_like(masks.parameters.detach(), 0.3)}
    counted = Masks.at_rest("deterministic", AXES, z).present(10)["F"]
    assert float(counted.min()) == 1


def test_a_row_shuts_the_lowest_scores() -> None:
    z = torch.tensor([[-0.1, 0.9, -0.02, 1.1]])
    axis = Gated(letter="D", rows=1, size=4, keep=3)
    masks = Masks.at_rest("deterministic", (axis,), {"parameters": z.reshape(-1)})
    assert masks.judged_as_expected(0)["D"].tolist() == [
        [0, pytest.approx(0.9), 0, pytest.approx(1.1)]
    ]
