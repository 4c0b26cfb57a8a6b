"""Pruning in rounds: the sizes in between, and many plans as one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.criteria.random import random_scores
from megatron_prune.errors import PlanError
from megatron_prune.model.axes import names
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.choose import Targets, check_targets, make_plan
from megatron_prune.planning.plan import PrunePlan, compose
from megatron_prune.planning.rounds import remaining_shape, round_targets, targets_after
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source
from tests.planning.test_choose import counts, draw, shape

# ---- sizes ---------------------------------------------------------------------------------------


def between(rounds: int, *, ranks: int = 1, **targets: Any) -> tuple[Targets, ...]:
    return round_targets(
        shape(), Targets(**targets), rounds, prune_type="balance", balance_for=ranks
    )


def test_sizes_go_down_linearly() -> None:
    found = between(3, hidden_size=30, ffn_hidden_size=60, num_layers=2)
    assert [(t.hidden_size, t.ffn_hidden_size, t.num_layers) for t in found] == [
        (42, 84, 3), (36, 72, 3), (30, 60, 2),
    ]  # fmt: skip


def test_an_axis_that_stays_whole_is_left_alone() -> None:
    found = between(2, hidden_size=40, ffn_hidden_size=96)
    assert found == (Targets(hidden_size=44), Targets(hidden_size=40))


def test_groups_keep_equally_many_heads() -> None:
    model = shape(num_attention_heads=24, num_query_groups=6)
    target = Targets(num_attention_heads=4, num_query_groups=2)
    found = round_targets(model, target, 4, prune_type="balance", balance_for=2)
    assert [(t.num_query_groups, t.num_attention_heads) for t in found] == [
        (6, 24), (4, 12), (4, 12), (2, 4),
    ]  # fmt: skip


def test_named_layers_go_in_the_order_in_which_they_stand() -> None:
    found = between(3, drop_layers=(3, 0))
    assert [t.drop_layers for t in found] == [(3,), (3,), (3, 0)]
    after = draw(shape(), drop_layers=(3,))
    assert targets_after(after, found[2]).drop_layers == (0,)
    after = draw(shape(), drop_layers=(0,))
    assert targets_after(after, found[2]).drop_layers == (2,)


def test_an_unbalanced_target_needs_no_multiple() -> None:
    target = Targets(ffn_hidden_size=51)
    found = round_targets(shape(), target, 2, prune_type="unbalance", balance_for=2)
    assert [t.ffn_hidden_size for t in found] == [74, 51]
    with pytest.raises(PlanError, match="51 over 2 tensor-parallel ranks"):
        round_targets(shape(), target, 2, prune_type="balance", balance_for=2)


@given(st.integers(1, 7), st.sampled_from([1, 2, 4]), st.data())
def test_every_round_is_legal_and_the_last_is_the_target(
    rounds: int, ranks: int, data: Any
) -> None:
    model = shape(num_attention_heads=24, num_query_groups=8, num_layers=9)
    groups = ranks * data.draw(st.integers(1, 8 // ranks))
    targets = Targets(
        hidden_size=data.draw(st.integers(1, 48)),
        ffn_hidden_size=ranks * data.draw(st.integers(1, 96 // ranks)),
        num_query_groups=groups,
        num_attention_heads=groups * data.draw(st.integers(1, 3)),
        num_layers=data.draw(st.integers(1, 9)),
    )
    found = round_targets(model, targets, rounds, prune_type="balance", balance_for=ranks)
    assert len(found) == rounds and found[-1] == check_targets(model, targets, ranks)
    before = model
    for target in found:
        after = remaining_shape(model, target)
        check_targets(before, target, ranks)
        assert all(after.size(axis) <= before.size(axis) for axis in "DQKFL")
        before = after


# ---- plans ---------------------------------------------------------------------------------------

TWICE = {
    "gqa": (
        {"hidden_size": 36, "num_attention_heads": 3, "drop_layers": (1,)},
        {"hidden_size": 21, "ffn_hidden_size": 60, "num_layers": 2},
    ),
    "four": (
        {"num_query_groups": 2, "ffn_hidden_size": 70},
        {"num_attention_heads": 2, "ffn_hidden_size": 40},
    ),
    "qwen_tied": (
        {"num_attention_heads": 4, "num_layers": 3},
        {"num_query_groups": 2, "hidden_size": 24, "drop_layers": (0,)},
    ),
    "mha": ({"num_attention_heads": 4}, {"num_attention_heads": 2}),
}


def plan_of(source: Source, seed: int, targets: dict[str, Any], ranks: int = 1) -> PrunePlan:
    return make_plan(
        source.config.shape, Targets(**targets), random_scores, criterion_name=f"c{seed}",
        seed=seed, prune_type="balance", balance_for=ranks, source_digest=source.digest,
    )  # fmt: skip


@pytest.mark.parametrize("kind", TWICE)
def test_pruning_by_the_composed_plan_is_pruning_twice(
    kind: str, models: Callable[[str], Path]
) -> None:
    source = open_source(models(kind))
    first = plan_of(source, 1, TWICE[kind][0])
    once = PrunedSource(source, first)
    second = plan_of(once, 2, TWICE[kind][1])
    twice, composed = PrunedSource(once, second), PrunedSource(source, compose(first, second))
    assert composed.config == twice.config
    assert composed.config.shape not in (source.config.shape, once.config.shape)
    for name in names(twice.config):
        assert torch.equal(composed.read(name), twice.read(name)), name
    source.close()


def test_a_composed_plan_is_of_the_source_and_decided_by_the_second() -> None:
    first, second = _two(ranks=3)
    found = compose(first, second)
    assert found.source == first.source and found.target == second.target
    assert (found.source_digest, found.criterion, found.seed) == ("one", "later", 8)
    assert (found.prune_type, found.balance_for) == ("balance", 3)
    for layer in range(4):
        assert counts(tuple(found.indices("F", layer)), 96, 3) == {20}
    assert found.kept.heads is None and found.kept.query_groups is None
    assert compose(first, replace(second, balance_for=2)).balance_for == 1
    assert compose(first, replace(second, prune_type="unbalance")).prune_type == "unbalance"


def _two(ranks: int) -> tuple[PrunePlan, PrunePlan]:
    first = replace(draw(shape(), ranks=ranks, ffn_hidden_size=84), source_digest="one")
    left: ModelShape = first.target
    second = draw(left, ranks=ranks, ffn_hidden_size=60, seed=8)
    return first, replace(second, criterion="later")


def test_composing_with_the_plan_of_everything_changes_nothing() -> None:
    first, _ = _two(ranks=3)
    everything = draw(first.target, ranks=3)
    assert compose(first, everything).kept == first.kept
    assert compose(draw(shape(), ranks=3), first).kept == first.kept


def test_a_second_plan_of_another_shape_is_refused() -> None:
    first, second = _two(ranks=1)
    with pytest.raises(PlanError, match="'ffn_hidden_size': 60.*made for.*plan the second on"):
        compose(compose(first, second), second)
