"""A shape from a budget: against plain enumeration, and what is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_prune.criteria.random import random_scores
from megatron_prune.errors import PlanError, ShapeError
from megatron_prune.families.llama import LLAMA
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.costs import parameters_at, serving_bytes, sizes_of
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.score_mass import ScoreMass, measure_scores, scored_axes
from megatron_prune.planning.search import (
    Budget,
    axis_probes,
    default_multiple,
    search,
    search_front,
    search_space,
)

PICO = ModelShape(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=12,
    num_query_groups=6,
    kv_channels=8,
    vocab_size=379,
)
SMOL = ModelShape(
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
)


def config_of(shape: ModelShape, **facts: Any) -> ModelConfig:
    return ModelConfig(family=LLAMA, shape=shape, tied=False, hf_config={}, **facts)


def parameters_budget(shape: ModelShape, limit: float) -> Budget:
    config = config_of(shape)
    return Budget(
        name="parameters",
        flag="--target-params",
        limit=limit,
        cost=lambda sizes: parameters_at(config, sizes),
        unit="M parameters",
        scale=1e6,
    )


def memory_budget(shape: ModelShape, limit: float) -> Budget:
    config = config_of(shape)
    return Budget(
        name="bytes",
        flag="--target-memory",
        limit=limit,
        cost=lambda sizes: serving_bytes(config, sizes, seq_length=64, batch_size=2, dtype="bf16"),
        unit="MiB",
        scale=2**20,
    )


def mass_of(shape: ModelShape, blocks: int = 1, **more: Any) -> ScoreMass:
    return measure_scores(shape, random_scores, seed=3, blocks=blocks, **more)


def same_axis(shape: ModelShape) -> tuple[int, ...]:
    """What has to be larger or equal in a shape that is as large in every way."""
    per_group = shape.num_attention_heads // shape.num_query_groups
    sizes = (shape.num_layers, shape.hidden_size, shape.num_query_groups)
    return (*sizes, per_group, shape.ffn_hidden_size)


def legal_shapes(
    source: ModelShape,
    *,
    multiple: tuple[int, int],
    ranks: int = 1,
    min_layers: int,
    proportions: float,
    multiple_of_heads: bool,
    groups: bool,
) -> Iterator[ModelShape]:
    """Every legal shape, by the rules as the module's docstring words them."""
    hidden_step, ffn_step = multiple
    for layers, hidden, number, each, ffn in product(
        range(min_layers, source.num_layers + 1),
        range(1, source.hidden_size + 1),
        range(1, source.num_query_groups + 1),
        range(1, source.heads_per_group + 1),
        range(1, source.ffn_hidden_size + 1),
    ):
        if hidden % hidden_step and hidden != source.hidden_size:
            continue
        if ffn % ffn_step and ffn != source.ffn_hidden_size:
            continue
        if ffn != source.ffn_hidden_size and ffn // ranks % min(8, ffn_step):
            continue  # tensor cores on every rank
        if not groups and source.heads_per_group > 1 and number != source.num_query_groups:
            continue
        if number % ranks or ffn % ranks or (multiple_of_heads and hidden % (number * each)):
            continue
        width = number * each / hidden / (source.num_attention_heads / source.hidden_size)
        wide = ffn / hidden / (source.ffn_hidden_size / source.hidden_size)
        if any(not 1 / proportions - 1e-9 <= x <= proportions + 1e-9 for x in (width, wide)):
            continue
        yield replace(
            source,
            num_layers=layers,
            hidden_size=hidden,
            num_query_groups=number,
            num_attention_heads=number * each,
            ffn_hidden_size=ffn,
        )


def plain_search(
    shapes: Sequence[ModelShape], budgets: Sequence[Budget], mass: ScoreMass
) -> list[ModelShape]:
    """The maximal shapes that fit, best first, by comparing every pair."""
    fit = [s for s in shapes if all(b.cost(sizes_of(s)) <= b.limit for b in budgets)]

    def is_maximal(shape: ModelShape) -> bool:
        mine = same_axis(shape)
        return not any(
            other != shape and all(a >= b for a, b in zip(same_axis(other), mine)) for other in fit
        )

    maximal = [shape for shape in fit if is_maximal(shape)]
    return sorted(maximal, key=lambda s: (float(mass.loss_at(sizes_of(s))), *(-x for x in same_axis(s))))  # fmt: skip # noqa: E501


CASES = {
    "plain": {},
    "llama": {"multiple_of_heads": True},
    "ranks": {"ranks": 3, "groups": True},
    "groups": {"groups": True, "multiple_of_heads": True},
    "wide": {"proportions": 4.0, "min_layers": 1},
    "narrow": {"proportions": 1.3},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_search_equals_enumeration_on_a_pico_shape(case: str, share: float) -> None:
    values: dict[str, Any] = {
        "ranks": 1, "min_layers": 2, "proportions": 2.0, "multiple_of_heads": False,
        "groups": False, **CASES[case],
    }  # fmt: skip
    whole = count_parameters(config_of(PICO))
    budgets = [parameters_budget(PICO, share * whole), memory_budget(PICO, share * whole * 2.3)]
    mass = mass_of(PICO, values["ranks"])
    space = search_space(
        PICO,
        balance_for=values["ranks"],
        multiple_of=4,
        min_layers=values["min_layers"],
        proportions=values["proportions"],
        hidden_multiple_of_heads=values["multiple_of_heads"],
        drop_query_groups=values["groups"],
    )
    wanted = plain_search(list(legal_shapes(PICO, multiple=(4, 4), **values)), budgets, mass)
    found = search(space, budgets, mass, 10_000, apart=0.0)
    assert [candidate.shape for candidate in found] == wanted and wanted
    for candidate in found:
        assert candidate.costs == {b.name: b.cost(sizes_of(candidate.shape)) for b in budgets}


@settings(max_examples=40)
@given(
    layers=st.integers(2, 40),
    hidden=st.integers(4, 60).map(lambda n: 16 * n),
    ffn=st.integers(4, 60).map(lambda n: 48 * n),
    groups=st.sampled_from([1, 2, 3, 4, 8]),
    per_group=st.integers(1, 4),
    share=st.floats(0.3, 1.1),
    data=st.data(),
)
def test_every_shape_found_is_legal_balanced_and_within_the_budget(
    layers: int, hidden: int, ffn: int, groups: int, per_group: int, share: float, data: Any
) -> None:
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=16,
        vocab_size=1000,
    )
    ranks = data.draw(st.sampled_from(shape.legal_tensor_parallel_sizes(8)))
    of_heads, drop = data.draw(st.booleans()), data.draw(st.booleans())
    budget = parameters_budget(shape, share * count_parameters(config_of(shape)))
    space = search_space(
        shape, balance_for=ranks, hidden_multiple_of_heads=of_heads, drop_query_groups=drop
    )
    try:
        found = search(space, [budget], mass_of(shape, ranks), 5)
    except PlanError:
        assert share < 1 or (of_heads and hidden % (groups * per_group)), "the source fits"
        return
    proxies = [candidate.proxy for candidate in found]
    assert proxies == sorted(proxies) and len(found) <= 5
    for target in (candidate.shape for candidate in found):
        assert count_parameters(config_of(target)) <= budget.limit
        target.check_tensor_parallel(ranks)
        assert not of_heads or target.hidden_size % target.num_attention_heads == 0
        assert math.ceil(layers / 2) <= target.num_layers <= layers
        assert drop or per_group == 1 or target.num_query_groups == groups
        for size, whole in ((target.hidden_size, hidden), (target.ffn_hidden_size, ffn)):
            assert size == whole or size % default_multiple(whole) == 0
        plan = make_plan(  # which refuses what is not balanced
            shape, targets_of(target), random_scores, criterion_name="random", seed=3,
            prune_type="balance", balance_for=ranks, source_digest="d",
        )  # fmt: skip
        assert plan.target == target


def targets_of(shape: ModelShape) -> Targets:
    return Targets(
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        num_layers=shape.num_layers,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("groups", "heads"), [(6, 12), (6, 6)])
def test_the_kept_share_is_of_the_scores_that_the_plan_keeps(
    ranks: int, groups: int, heads: int
) -> None:
    target = replace(
        PICO, hidden_size=20, ffn_hidden_size=48, num_query_groups=groups,
        num_attention_heads=heads, num_layers=3,
    )  # fmt: skip
    plan = make_plan(
        PICO, replace(targets_of(target), num_layers=None), random_scores, criterion_name="random",
        seed=3, prune_type="balance", balance_for=ranks, source_digest="d",
    )  # fmt: skip
    wanted = {}
    for name, axis in (("hidden", "D"), ("heads", "Q"), ("ffn", "F")):
        shares = []
        for layer in [None] if axis == "D" else range(4):
            scores = random_scores(axis, PICO.size(axis), layer, 3)
            shares.append(float(scores[list(plan.indices(axis, layer))].sum() / scores.sum()))
        wanted[name] = sum(shares) / len(shares)
    best = random_scores("L", 4, None, 3).sort(descending=True).values
    wanted["layers"] = float(best[:3].sum() / best.sum())
    weights = {"hidden": 3.0, "ffn": 0.5, "heads": 2.0, "layers": 1.5}
    mass = mass_of(PICO, ranks, weights=weights)
    kept = mass.kept_at(sizes_of(target))
    assert {name: float(x) for name, x in kept.items()} == pytest.approx(wanted)
    loss = sum(-math.log(x) * weights[name] / mass.halves[name] for name, x in wanted.items())
    assert float(mass.loss_at(sizes_of(target))) == pytest.approx(loss)
    assert float(mass.loss_at(sizes_of(PICO))) == 0


@pytest.mark.parametrize(("axis", "half"), [("D", 24), ("F", 48), ("Q", 6), ("L", 2)])
def test_the_proxy_of_half_an_axis_is_its_weight(axis: str, half: int) -> None:
    weights = {"hidden": 3.0, "ffn": 0.5, "heads": 2.0, "layers": 1.5}
    names = {"D": "hidden", "F": "ffn", "Q": "heads", "L": "layers"}
    mass = mass_of(PICO, weights=weights)
    found = mass.loss_at({**sizes_of(PICO), axis: half})
    assert float(found) == pytest.approx(weights[names[axis]])
    three = replace(PICO, num_attention_heads=9, num_query_groups=3)  # no half: 1 of 3 heads
    flat = measure_scores(three, lambda axis, size, *_: torch.ones(size), seed=0, weights=weights)
    found = flat.loss_at({**sizes_of(three), "Q": 3})
    assert float(found) == pytest.approx(weights["heads"] * math.log(3) / math.log(2))


def test_weights_from_a_probe_give_its_loss_back() -> None:
    probes = axis_probes(search_space(PICO, multiple_of=4))
    assert {name: same_axis(shape) for name, shape in probes.items()} == {
        "layers": (3, 48, 6, 2, 96), "hidden": (4, 36, 6, 2, 96), "ffn": (4, 48, 6, 2, 72),
        "heads": (4, 48, 6, 1, 96),
    }  # fmt: skip
    excess = {"layers": 0.5, "hidden": 3.0, "ffn": -0.2, "heads": 0.1}
    found = {name: (sizes_of(shape), excess[name]) for name, shape in probes.items()}
    mass = mass_of(PICO).calibrated(found)
    for sizes, loss in found.values():
        assert float(mass.loss_at(sizes)) == pytest.approx(max(loss, 1e-4))
    assert "heads" not in axis_probes(search_space(PICO, fixed={"Q": 6}))


def test_whole_groups_go_by_the_scores_of_the_groups() -> None:
    """Heads of a kept group count, whatever the heads of a dropped one are worth."""

    def scores(axis: str, size: int, layer: int | None, seed: int) -> torch.Tensor:
        if axis == "K":
            return torch.tensor([0.0, 0, 0, 5, 0, 0], dtype=torch.float64)
        if axis == "Q":
            return torch.tensor([9.0, 9, 1, 1, 1, 1, 2, 3, 1, 1, 1, 1], dtype=torch.float64)
        return random_scores(axis, size, layer, seed)

    heads = measure_scores(PICO, scores, seed=0).heads
    assert heads[1] == pytest.approx([0, 3 / 31, 5 / 31])


def test_scores_that_are_negative_or_all_zero_have_shares() -> None:
    def scores(axis: str, size: int, layer: int | None, seed: int) -> torch.Tensor:
        x = torch.zeros(size, dtype=torch.float64)
        if axis == "L":
            x[:2] = torch.tensor([-1.0, 2.0])
        return x

    mass = measure_scores(PICO, scores, seed=0)
    assert mass.ffn[48] == pytest.approx(0.5)
    assert mass.layers.tolist() == pytest.approx([0, 3 / 5, 4 / 5, 1, 1])


def test_axes_that_a_criterion_does_not_score_are_found() -> None:
    def scores(axis: str, size: int, layer: int | None, seed: int) -> torch.Tensor:
        if axis in "LK":
            raise PlanError("no")
        return torch.ones(size)

    assert scored_axes(PICO, scores, seed=0) == frozenset("DQF")


def test_shapes_that_are_near_a_better_one_are_passed_over() -> None:
    budget = parameters_budget(SMOL, 100e6)
    found = search(search_space(SMOL), [budget], mass_of(SMOL), 6, apart=0.1)
    for number, one in enumerate(found):
        for other in found[:number]:
            shares = [
                abs(one.shape.size(axis) - other.shape.size(axis)) / SMOL.size(axis)
                for axis in "LDQF"
            ]
            assert max(shares) >= 0.1
    # passing one over does not let a smaller one in its place: all are maximal
    everything = search(search_space(SMOL), [budget], mass_of(SMOL), 10_000, apart=0.0)
    found = search(search_space(SMOL), [budget], mass_of(SMOL), 100, apart=0.1)
    assert {candidate.shape for candidate in found} <= {c.shape for c in everything}
    near = search(search_space(SMOL), [budget], mass_of(SMOL), 6, apart=0.0)
    assert near[0] == found[0] and near[1:] != found[1:]


def test_the_source_itself_is_found_when_it_fits() -> None:
    budget = parameters_budget(SMOL, 1e9)
    found = search(search_space(SMOL, hidden_multiple_of_heads=True), [budget], mass_of(SMOL), 3)
    assert [candidate.shape for candidate in found] == [SMOL] and found[0].proxy == 0


def test_sizes_that_are_fixed_stay() -> None:
    fixed = {"D": 500, "Q": 6, "L": 29}
    space = search_space(SMOL, fixed=fixed)
    for candidate in search(space, [parameters_budget(SMOL, 100e6)], mass_of(SMOL), 5):
        assert {axis: candidate.shape.size(axis) for axis in fixed} == fixed


def test_the_front_grows_with_its_limits_and_loses_less() -> None:
    budget = parameters_budget(SMOL, 100e6)
    limits = [50e6, 80e6, 110e6, 135e6]
    front = search_front(search_space(SMOL), budget, mass_of(SMOL), limits, 3)
    costs = [candidate.costs["parameters"] for candidate in front]
    assert costs == sorted(costs) and len({c.shape for c in front}) == len(front)
    best = [min(c.proxy for c in front if c.costs["parameters"] <= limit) for limit in limits]
    assert best == sorted(best, reverse=True) and len(set(best)) == 4
    assert search_front(search_space(SMOL), budget, mass_of(SMOL), [1.0], 3) == []


@pytest.mark.parametrize("groups", [8, 64])
def test_a_70b_shape_takes_seconds_at_most(groups: int) -> None:
    shape = ModelShape(
        num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64,
        num_query_groups=groups, kv_channels=128, vocab_size=128256,
    )  # fmt: skip
    started = time.process_time()
    space = search_space(shape, balance_for=8, drop_query_groups=True)
    found = search(space, [parameters_budget(shape, 34e9)], mass_of(shape, 8), 8)
    assert len(found) == 8 and time.process_time() - started < 10  # 0.5 on one core


def refused(**changes: Any) -> str:
    with pytest.raises((PlanError, ShapeError)) as caught:
        search_space(SMOL, **changes)
    return str(caught.value)


def test_what_the_space_refuses() -> None:
    assert "--min-layers 31: the model has 30; wanted 1 to that" in refused(min_layers=31)
    assert "--proportions 0.5: is a factor either way" in refused(proportions=0.5)
    assert "--multiple-of 0: wanted 1 or more" in refused(multiple_of=0)
    assert "tensor-model-parallel-size 2 does not divide" in refused(balance_for=2)
    assert "axis D: 600 is asked for; wanted 1 to 576" in refused(fixed={"D": 600})
    assert "axis F: 1000 is asked for; wanted a multiple of --balance-for 3" in refused(
        fixed={"F": 1000}, balance_for=3
    )
    message = refused(fixed={"Q": 7})
    assert "--num-attention-heads-remain 7 over 3 query groups" in message
    assert "equally many in every group (3, 6, 9)" in message
    with pytest.raises(PlanError, match="--proxy-weights width=1: wanted numbers of 0 or more"):
        mass_of(SMOL, weights={"width": 1.0})


def smallest() -> ModelShape:
    shapes = legal_shapes(
        PICO, multiple=(4, 4), min_layers=3, proportions=2.0, multiple_of_heads=False, groups=False
    )
    return min(shapes, key=lambda shape: count_parameters(config_of(shape)))


def test_a_budget_that_no_shape_meets_names_the_nearest() -> None:
    space = search_space(PICO, multiple_of=4, min_layers=3)
    with pytest.raises(PlanError) as caught:
        search(space, [parameters_budget(PICO, 5000)], mass_of(PICO), 5)
    shape = smallest()
    assert str(caught.value).startswith(
        "--target-params 0.005 M parameters: no legal shape is so small; nearest: "
        f"3 layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads in 6 groups, "
        f"FFN {shape.ffn_hidden_size} ({count_parameters(config_of(shape)) / 1e6:.6g} M parameters)"
    )
    assert "--min-layers" in str(caught.value)


def test_rules_that_leave_no_shape_say_so() -> None:
    odd = replace(PICO, hidden_size=50)
    space = search_space(
        odd, fixed={"D": 50}, hidden_multiple_of_heads=True, proportions=1.0, multiple_of=4
    )
    with pytest.raises(PlanError, match="no shape of this model is legal, not even its own"):
        search(space, [parameters_budget(odd, 1e9)], mass_of(odd), 1)
