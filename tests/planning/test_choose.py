"""From scores and targets to kept indices: law 3, balance, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.criteria.random import random_scores
from megatron_prune.errors import PlanError
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.choose import (
    Targets,
    keep_in_groups,
    keep_top,
    make_plan,
    parse_layers,
)
from megatron_prune.planning.plan import PrunePlan


def shape(**change: int) -> ModelShape:
    values = {
        "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6,
        "num_query_groups": 3, "kv_channels": 8, "vocab_size": 379,
    }  # fmt: skip
    return ModelShape(**{**values, **change})


def draw(
    model: ModelShape, *, seed: int = 7, prune_type: str = "balance", ranks: int = 1, **targets: Any
) -> PrunePlan:
    return make_plan(
        model,
        Targets(**targets),
        random_scores,
        criterion_name="random",
        seed=seed,
        prune_type=prune_type,
        balance_for=ranks,
        source_digest="d",
    )


scores_lists = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=8)


@given(st.integers(1, 4), scores_lists, st.data())
def test_keep_top_is_the_best_of_each_block(blocks: int, block: list[float], data: Any) -> None:
    """Against a plain sort; equal scores prefer the lower index."""
    size = len(block)
    values = [data.draw(st.permutations(block)) for _ in range(blocks)]
    keep = data.draw(st.integers(1, size))
    found = keep_top(torch.tensor(values).flatten(), keep * blocks, blocks)
    wanted = []
    for number, mine in enumerate(values):
        best = sorted(range(size), key=lambda i: (-mine[i], i))[:keep]
        wanted += [number * size + i for i in sorted(best)]
    assert list(found) == wanted


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_heads_are_the_best_of_each_kept_group(groups: int, per_group: int, data: Any) -> None:
    scores = [data.draw(st.floats(-1, 1)) for _ in range(groups * per_group)]
    kept_groups = sorted(data.draw(st.sets(st.integers(0, groups - 1), min_size=1)))
    keep = data.draw(st.integers(1, per_group))
    found = keep_in_groups(torch.tensor(scores, dtype=torch.float64), kept_groups, keep, per_group)
    for group in range(groups):
        mine = [h for h in found if h // per_group == group]
        assert len(mine) == (keep if group in kept_groups else 0)
        others = [h for h in range(group * per_group, (group + 1) * per_group) if h not in mine]
        if mine and others:
            assert min(scores[h] for h in mine) >= max(scores[h] for h in others)


def counts(indices: tuple[int, ...], size: int, parts: int) -> set[int]:
    """How many of ``indices`` fall to each of ``parts`` equal parts of an axis."""
    return {sum(i * parts // size == part for i in indices) for part in range(parts)}


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 2**31), st.data())
def test_a_balanced_plan_is_balanced_for_every_divisor(ranks: int, seed: int, data: Any) -> None:
    model = shape(num_attention_heads=24, num_query_groups=12)
    groups = ranks * data.draw(st.integers(1, 12 // ranks))
    plan = draw(
        model,
        seed=seed,
        ranks=ranks,
        ffn_hidden_size=ranks * data.draw(st.integers(1, 96 // ranks)),
        num_query_groups=groups,
        num_attention_heads=groups * data.draw(st.integers(1, 2)),
    )
    for layer in range(4):
        for axis, size in (("F", 96), ("K", 12), ("Q", 24)):
            for divisor in (n for n in range(1, ranks + 1) if ranks % n == 0):
                assert len(counts(tuple(plan.indices(axis, layer)), size, divisor)) == 1


def test_an_unbalanced_plan_takes_the_best_wherever_they_are() -> None:
    plan = draw(shape(), prune_type="unbalance", ranks=3, ffn_hidden_size=51)
    scores = random_scores("F", 96, 0, 7)
    assert plan.indices("F", 0) == tuple(sorted(scores.topk(51).indices.tolist()))
    assert len(counts(tuple(plan.indices("F", 0)), 96, 3)) > 1


def test_the_same_seed_gives_the_same_plan_and_another_seed_another() -> None:
    targets = {"ffn_hidden_size": 60, "num_attention_heads": 3, "hidden_size": 36}
    one = draw(shape(), ranks=3, **targets)
    assert one == draw(shape(), ranks=3, **targets)
    assert one.kept != draw(shape(), ranks=3, seed=8, **targets).kept


def test_what_one_axis_keeps_does_not_depend_on_the_others() -> None:
    """The stream of random numbers is seeded by axis and layer."""
    both = draw(shape(), ranks=3, ffn_hidden_size=60, hidden_size=36, drop_layers=(1,))
    alone = draw(shape(), ranks=3, ffn_hidden_size=60)
    assert both.kept.ffn == {n: alone.kept.ffn[n] for n in (0, 2, 3)}


def test_layers_and_ranks_draw_independently() -> None:
    plan = draw(shape(), ranks=3, ffn_hidden_size=60)
    first, second = (plan.indices("F", layer) for layer in (0, 1))
    assert first != second
    local = [[i - 32 * rank for i in first if i // 32 == rank] for rank in range(3)]
    assert local[0] != local[1] and local[1] != local[2]


def test_in_a_model_with_one_head_a_group_either_flag_says_both() -> None:
    model = shape(num_query_groups=6)
    by_heads = draw(model, num_attention_heads=4)
    by_groups = draw(model, num_query_groups=4)
    assert by_heads.kept == by_groups.kept
    assert by_heads.kept.heads == by_heads.kept.query_groups


def test_an_axis_asked_to_stay_whole_is_null() -> None:
    kept = draw(shape(), hidden_size=48, ffn_hidden_size=96, num_attention_heads=6).kept
    assert (kept.hidden, kept.ffn, kept.heads, kept.query_groups, kept.layers) == (None,) * 5


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("7,13,18-20", (7, 13, 18, 19, 20)),
        (" 1 , 2 ", (1, 2)),
        ("3-3", (3,)),
    ],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    ["one", "1.5", "-1", "1-", "-", "1-2-3", "0x1", "²", "1;2", "5-3", "", " ", ",", "1,,2"],
)
def test_what_is_no_list_of_layers_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--drop-layers"):
        parse_layers(text)


def test_a_range_of_a_billion_layers_is_refused_at_once() -> None:
    with pytest.raises(PlanError, match="0-999999999999"):
        parse_layers("0-999999999999")


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        ((4,), "4 is not a layer; the model has 0 to 3"),
        ((1, 1), "1 stands twice"),
        ((0, 1, 2, 3), "drops all 4 layers; keep at least one"),
    ],
)
def test_layers_that_cannot_be_dropped_are_refused(dropped: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        draw(shape(), drop_layers=dropped)


@pytest.mark.parametrize(
    ("targets", "ranks", "message"),
    [
        ({"hidden_size": 999}, 1, "--hidden-size-remain 999: the model has 48; wanted 1 to 48"),
        ({"hidden_size": 0}, 1, "--hidden-size-remain 0"),
        ({"hidden_size": -3}, 1, "--hidden-size-remain -3"),
        ({"num_attention_heads": 7}, 1, "the model has 6"),
        ({"num_query_groups": 4}, 1, "the model has 3"),
        ({"num_attention_heads": 4}, 1, r"4 over 3 query groups .* \(3, 6\)"),
        (
            {"num_attention_heads": 6, "num_query_groups": 2},
            1,
            r"6 over 2 query groups of up to 2 heads.*\(2, 4\)",
        ),
        ({"ffn_hidden_size": 50}, 3, "50 over 3 tensor-parallel ranks.* nearest: 48 or 51"),
        ({"ffn_hidden_size": 1}, 3, "nearest: 3 "),
        ({"ffn_hidden_size": 95}, 4, "nearest: 92 or 96"),
        ({"ffn_hidden_size": 60}, 7, "--balance-for 7 does not divide the model's 96"),
        ({"ffn_hidden_size": 60}, 0, "--balance-for 0: wanted 1 or more"),
        ({"num_query_groups": 2}, 3, "--num-query-groups-remain 2 over 3"),
        ({"num_attention_heads": 6}, 2, "--balance-for 2 does not divide the model's 3"),
    ],
)
def test_an_impossible_target_is_refused_with_what_is_near(
    targets: dict[str, int], ranks: int, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        draw(shape(), ranks=ranks, **targets)


sizes = st.integers(-1, 14)


@given(st.none() | sizes, st.none() | sizes, st.none() | sizes, st.integers(1, 4), st.booleans())
def test_every_target_is_met_exactly_or_refused(
    heads: int | None, groups: int | None, ffn: int | None, ranks: int, balanced: bool
) -> None:
    """Twelve heads in four groups, twelve channels: nothing but a plan or a PlanError."""
    model = shape(num_attention_heads=12, num_query_groups=4, ffn_hidden_size=12)
    kind = "balance" if balanced else "unbalance"
    try:
        plan = draw(
            model,
            ranks=ranks,
            prune_type=kind,
            num_attention_heads=heads,
            num_query_groups=groups,
            ffn_hidden_size=ffn,
        )
    except PlanError:
        wanted_groups = 4 if groups is None else groups
        wanted_heads = wanted_groups * 3 if heads is None else heads
        wanted = [(wanted_groups, 4), (wanted_heads, 12), (12 if ffn is None else ffn, 12)]
        fits = all(1 <= keep <= size for keep, size in wanted)
        fits = fits and wanted_heads % wanted_groups == 0
        fits = fits and wanted_heads // wanted_groups <= 3
        named = [wanted_groups, 4, wanted_heads, 12] if (heads, groups) != (None, None) else []
        named += [ffn, 12] if ffn is not None else []
        if balanced:
            fits = fits and all(size % ranks == 0 for size in named)
        assert not fits
        return
    for axis, size in (("F", 12), ("K", 4), ("Q", 12)) if balanced else ():
        asked = ffn if axis == "F" else (heads, groups)
        if asked not in (None, (None, None)):
            assert len(counts(tuple(plan.indices(axis, 0)), size, ranks)) == 1
    assert plan.target.ffn_hidden_size == (12 if ffn is None else ffn)
    assert plan.target.num_query_groups == (4 if groups is None else groups)
    if heads is not None:
        assert plan.target.num_attention_heads == heads
