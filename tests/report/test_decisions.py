"""Masks and overlaps against the planner and a plain loop."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.planning.choose import Targets
from megatron_prune.report.decisions import (
    axis_scores,
    chance,
    chosen_mask,
    criteria_of,
    is_pruned,
    kept_mask,
    overlap,
    overlap_masks,
)
from tests.report.inputs import SHAPE, TARGETS, make_scores, plan_of

WITH_GROUPS = Targets(num_query_groups=2, num_attention_heads=2, ffn_hidden_size=50)


@pytest.mark.parametrize("tp", [1, 3])
@pytest.mark.parametrize("axis", "QFDL")
def test_a_criterion_would_keep_what_its_own_plan_keeps(axis: str, tp: int) -> None:
    scores = make_scores()
    plan = plan_of(scores, tp=tp)
    own = axis_scores(scores, "activation", axis)
    assert own is not None
    assert torch.equal(chosen_mask(plan, axis, own), kept_mask(plan, axis))
    other = axis_scores(scores, "perplexity" if axis == "L" else "wanda", axis)
    assert other is not None
    assert not torch.equal(chosen_mask(plan, axis, other), kept_mask(plan, axis))


@pytest.mark.parametrize("axis", "QKF")
def test_kept_groups_bind_what_a_criterion_would_keep(axis: str) -> None:
    scores = make_scores()
    plan = plan_of(scores, WITH_GROUPS, tp=1)
    own = axis_scores(scores, "activation", axis)
    assert own is not None
    assert torch.equal(chosen_mask(plan, axis, own), kept_mask(plan, axis))


def test_masks_are_the_plan_s_indices_and_empty_in_dropped_layers() -> None:
    plan = plan_of(make_scores())
    mask = kept_mask(plan, "F")
    for layer in range(SHAPE.num_layers):
        wanted = list(plan.indices("F", layer)) if layer in plan.layers else []
        assert mask[layer].nonzero().flatten().tolist() == wanted
    assert kept_mask(plan, "D").nonzero().flatten().tolist() == list(plan.indices("D"))
    assert kept_mask(plan, "L").nonzero().flatten().tolist() == list(plan.layers)
    assert is_pruned(plan, "Q") and not is_pruned(plan, "K")


@pytest.mark.parametrize("axis", "QFDL")
def test_overlap_is_the_share_of_kept_units_counted_one_by_one(axis: str) -> None:
    scores = make_scores(activation="DQFL", wanda="DQFL", taylor="DQFL")
    plan = plan_of(scores)
    masks = overlap_masks(plan, axis, criteria_of(scores, axis, plan.criterion))
    assert list(masks) == ["the plan", "activation", "taylor", "wanda"]
    shares = overlap(masks)
    for y, a in enumerate(masks.values()):
        for x, b in enumerate(masks.values()):
            mine = {tuple(i) for i in a.nonzero().tolist()}
            theirs = {tuple(i) for i in b.nonzero().tolist()}
            assert float(shares[y, x]) == pytest.approx(len(mine & theirs) / len(mine))
    assert torch.equal(shares[0], shares[1]) and float(shares[0, 2]) < 1


def test_chance_is_the_mean_overlap_of_random_plans() -> None:
    scores = make_scores()
    generator = torch.Generator().manual_seed(0)
    for targets in (TARGETS, WITH_GROUPS):
        plan = plan_of(scores, targets, tp=1)
        for axis in "QF":
            found = []
            for _ in range(200):
                a, b = (
                    chosen_mask(
                        plan, axis, torch.rand(kept_mask(plan, axis).shape, generator=generator)
                    )
                    for _ in range(2)
                )
                found.append(float(overlap({"a": a, "b": b})[0, 1]))
            assert sum(found) / len(found) == pytest.approx(chance(plan, axis), abs=0.03)
    assert chance(plan_of(scores), "D") == 36 / 48 and chance(plan_of(scores), "L") == 3 / 4


def test_the_plan_s_composite_comes_first_and_by_the_name_it_has_along_the_axis() -> None:
    scores = make_scores()
    for expression, axis, names in (
        ("wanda", "D", ["wanda", "activation"]),
        ("hidden=wanda,layers=perplexity", "D", ["wanda", "activation"]),
        ("hidden=wanda,layers=perplexity", "L", ["perplexity", "activation"]),
        ("hidden=wanda", "Q", ["activation", "wanda"]),
        ("activation+2*wanda", "F", ["activation+2*wanda", "activation", "wanda"]),
        ("hidden=wanda,ffn=activation+wanda", "F", ["activation+wanda", "activation", "wanda"]),
        ("random", "F", ["activation", "wanda"]),
        ("", "K", ["activation", "wanda"]),
    ):
        assert list(criteria_of(scores, axis, expression)) == names
    assert criteria_of(None, "D") == {}
