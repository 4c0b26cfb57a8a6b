"""Masks of exactly the target: the projection against plain loops, its gradient, and the plan's."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_prune.shearing.constraint import Constraint, Warmup
from megatron_prune.shearing.masks import Masks
from megatron_prune.shearing.method import MaskRates
from megatron_prune.shearing.projected import Projected, likelihood, projection
from megatron_prune.shearing.units import Gated, blocks, count, gated_axes
from tests.shearing.shapes import AXES, SHAPE, TARGET

BOTH = gated_axes(SHAPE, replace(TARGET, num_query_groups=1, num_attention_heads=2), "both")
BALANCED = gated_axes(replace(SHAPE, num_query_groups=6), replace(TARGET, num_query_groups=4,
                      num_attention_heads=4), None, 2)  # fmt: skip


def _likely(axes: tuple[Gated, ...], seed: int = 0, ties: bool = False) -> Tensor:
    found = torch.rand(count(axes), generator=torch.Generator().manual_seed(seed))
    return found.mul(4).round().div(4) if ties else found


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("axes", [AXES, BOTH, BALANCED], ids=["heads", "both", "balanced"])
def test_the_likeliest_of_each_part_stay(axes: tuple[Gated, ...], ties: bool) -> None:
    p = _likely(axes, ties=ties)
    found = blocks(projection(p, axes), axes)
    for axis in axes:
        assert axis.keep is not None
        each, keep = axis.size // axis.parts, axis.keep // axis.parts
        for likely, mask in zip(blocks(p, axes)[axis.letter].tolist(), found[axis.letter].tolist()):
            stays = set()
            for first in range(0, axis.size, each):
                mine = sorted(range(first, first + each), key=lambda i: (-likely[i], i))
                stays |= set(mine[:keep])
            assert {i for i, gate in enumerate(mask) if gate == 1} == stays
            assert sum(mask) == axis.keep


def test_heads_are_equally_many_in_every_group() -> None:
    """And F and K on every rank of two; a control: those that stay are others without parts."""
    parts = {axis.letter: axis.parts for axis in AXES}
    assert parts == {"D": 1, "Q": 2, "F": 1, "L": 1}
    assert {axis.letter: axis.parts for axis in BALANCED} == {"D": 1, "K": 2, "F": 2, "L": 1}
    p = _likely(AXES, seed=1)
    loose = tuple(replace(axis, parts=1) for axis in AXES)
    mine, other = blocks(projection(p, AXES), AXES), blocks(projection(p, loose), AXES)
    assert mine["Q"].view(3, 2, 3).sum(2).tolist() == [[2, 2]] * 3
    assert not torch.equal(mine["Q"], other["Q"])
    assert torch.equal(mine["F"], other["F"])


def test_forward_hard_and_backward_soft() -> None:
    """1 and 0 to the bit; the gradient is that of p = sigmoid(z / 1.5), shut gates' too."""
    z = torch.linspace(-3, 3, count(AXES), dtype=torch.float64).requires_grad_()
    gates = Projected().drawn(z, None, 0.5, AXES)
    assert torch.equal(gates.detach(), projection(likelihood(z.detach()), AXES))
    assert set(gates.tolist()) == {0.0, 1.0}
    upstream = torch.linspace(1, 2, len(z), dtype=torch.float64)
    (found,) = torch.autograd.grad((gates * upstream).sum(), z)
    for at, by, slope in zip(z.tolist(), upstream.tolist(), found.tolist()):
        likely = [1 / (1 + math.exp(-(at + d) / 1.5)) for d in (1e-6, -1e-6)]
        assert slope == pytest.approx(by * (likely[0] - likely[1]) / 2e-6, rel=1e-6)


def _masks(steps: int = 60, mask: float = 0.05) -> Masks:
    held = Constraint(axes=AXES, warmup=Warmup())
    return Masks("projected", held, MaskRates(mask=mask, lagrangian=()), 7, steps)


def test_nothing_holds_them_but_the_projection() -> None:
    masks = _masks()
    given = torch.linspace(-1, 1, len(masks.parameters))
    norm = masks.constrain(given.clone(), 0)
    assert norm == pytest.approx(float(given.norm()))
    assert masks.lambdas.shape == (0, len(AXES))
    for step in (0, 30, 60):
        found = masks.constraint.sparsities(masks.present(step))
        for axis, s in zip(AXES, found):
            assert s.tolist() == pytest.approx([axis.target] * axis.rows)


def test_they_find_the_units_that_matter() -> None:
    """A loss that every open gate lowers by its worth, seen through noise; a control: not at first.

    Without noise Adam would raise all of them alike.
    """
    masks, generator = _masks(), torch.Generator().manual_seed(1)
    worth = torch.rand(count(AXES), generator=generator)
    wanted = projection(worth, AXES)

    def right() -> float:
        found = torch.cat([x.reshape(-1) for x in masks.judged_as_expected(0).values()])
        return float((found * wanted).sum() / wanted.sum())

    first = right()
    for step in range(200):
        seen = worth + torch.randn(len(worth), generator=generator)
        loss = -(seen * masks.drawn(step, 0)).sum()
        masks.constrain(*torch.autograd.grad(loss, masks.parameters), step)
        masks.step(step, 1.0, 1.0)
    assert first < 0.8 and right() > 0.9, (first, right())


def test_state_continues_to_the_bit() -> None:
    whole, half = _masks(), _masks()
    push = torch.linspace(-1, 1, len(whole.parameters))

    def run(masks: Masks, first: int, last: int) -> None:
        for step in range(first, last):
            masks.constrain(push * (step + 1), step)
            masks.step(step, 1.0, 0.5)

    run(whole, 0, 6)
    run(half, 0, 3)
    again = _masks()
    again.load(half.state())
    run(again, 3, 6)
    assert torch.equal(again.parameters, whole.parameters)
    assert not torch.equal(again.parameters, half.parameters)
