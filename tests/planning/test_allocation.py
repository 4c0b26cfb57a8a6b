"""How layers share FFN channels: the optimum of brute force, ties by index, what is refused."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.errors import PlanError
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.allocation import Nonuniform, comparable, spread
from megatron_prune.planning.choose import Targets, keep_top, make_plan

RAW = Nonuniform(floor=0, scores="raw")


def best_by_trying_all(scores_LF: Tensor, average: int, ranks: int, rules: Nonuniform) -> float:
    """The highest sum of kept scores over every legal choice of counts."""
    layers, size = scores_LF.shape
    legal = [
        n
        for n in range(1, size + 1)
        if n % rules.multiple == 0 and n % ranks == 0 and n >= rules.floor * average
    ]
    worth = [
        {n: float(row[list(keep_top(row, n, ranks))].sum()) for n in legal} for row in scores_LF
    ]
    sums = [
        sum(of[n] for of, n in zip(worth, counts))
        for counts in product(legal, repeat=layers)
        if sum(counts) == average * layers
    ]
    return max(sums)


@given(
    st.integers(0, 10**6),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([0.0, 0.25, 0.6, 1.0]),
    st.booleans(),
)
def test_it_is_the_optimum_under_floor_multiple_and_balance(
    seed: int, layers: int, average: int, ranks: int, multiple: int, floor: float, ties: bool
) -> None:
    scores = torch.rand(layers, 12, generator=torch.Generator().manual_seed(seed)).double()
    scores = (scores * 4).floor() if ties else scores * (1 + torch.arange(layers))[:, None]
    rules = Nonuniform(floor=floor, multiple=multiple, scores="raw")
    try:
        counts = spread(scores, average, ranks, rules)
    except PlanError:
        with pytest.raises(ValueError, match="empty"):  # nothing is legal
            best_by_trying_all(scores, average, ranks, rules)
        return
    assert sum(counts) == average * layers
    assert all(n % multiple == 0 and n % ranks == 0 and n >= floor * average for n in counts)
    found = sum(float(x[list(keep_top(x, n, ranks))].sum()) for x, n in zip(scores, counts))
    assert found == pytest.approx(best_by_trying_all(scores, average, ranks, rules), abs=1e-9)


def test_equal_scores_prefer_the_earlier_layer_and_are_the_same_every_time() -> None:
    same = torch.ones(3, 8)
    assert spread(same, 4, 1, RAW) == [8, 3, 1]  # the least is one channel
    assert spread(same, 4, 1, Nonuniform(floor=0.5)) == [8, 2, 2]


def test_standardized_scores_do_not_see_a_layers_scale_and_raw_ones_do() -> None:
    scores = torch.rand(4, 32, generator=torch.Generator().manual_seed(1)).double()
    louder = scores * torch.tensor([1, 10, 100, 1000])[:, None] + 5
    rules = Nonuniform(scores="standardized")
    assert spread(scores, 16, 1, rules) == spread(louder, 16, 1, rules)
    assert spread(louder, 16, 1, RAW)[3] == 32 != spread(scores, 16, 1, RAW)[3]


def test_logarithms_do_not_see_a_layers_scale_and_hardly_an_outlier() -> None:
    scores = torch.rand(4, 64, generator=torch.Generator().manual_seed(1)).double()
    louder = scores * torch.tensor([1, 10, 100, 1000])[:, None]
    assert spread(scores, 32, 1, Nonuniform()) == spread(louder, 32, 1, Nonuniform())
    scores[2, 0] = 1e4
    log, plain = (spread(scores, 48, 1, Nonuniform(scores=how)) for how in ("log", "standardized"))
    assert plain[2] == 64 and log[2] < 56


def test_zeros_and_negative_scores_have_logarithms_too() -> None:
    scores = torch.tensor([[0.0, 0, 1, 2], [-1, 3, 3, 3], [0, 0, 0, 0]])
    found = comparable(scores, "log")
    assert found.isfinite().all() and found[0, 0] == found[0, 1] < found[0, 2] < found[0, 3]
    assert found[2].tolist() == [0] * 4


def test_standardized_is_the_deviation_from_the_mean_in_standard_deviations() -> None:
    found = comparable(torch.tensor([[1.0, 2.0, 6.0], [7.0, 7.0, 7.0]]), "standardized")
    deviation = ((4 + 1 + 9) / 3) ** 0.5
    wanted = [[-2 / deviation, -1 / deviation, 3 / deviation], [0, 0, 0]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize(
    ("average", "ranks", "rules", "message"),
    [
        (10, 1, Nonuniform(multiple=16), "30 channels over 3 .* multiple of 16 .*; nearest: 16$"),
        (10, 3, Nonuniform(multiple=4), "30 channels .* of 12 .*; nearest: 8 or 12$"),
        (40, 1, Nonuniform(multiple=30), "a layer keeps at most 30, in multiples of 30"),
        (
            40,
            1,
            Nonuniform(multiple=64),
            "at most 0, .*; ask for a smaller multiple$",
        ),
        (15, 1, Nonuniform(multiple=9, floor=0.9), "at least 18 in multiples of 9"),
    ],
)
def test_what_does_not_work_out_is_refused_with_what_does(
    average: int, ranks: int, rules: Nonuniform, message: str
) -> None:
    with pytest.raises(
        PlanError, match=f"--ffn-hidden-size-remain {average} --nonuniform: .*{message}"
    ):
        spread(torch.rand(3, 48), average, ranks, rules)


def test_a_plan_keeps_the_best_of_each_layer_and_only_unequal_layers_make_it_nonuniform() -> None:
    shape = ModelShape(
        num_layers=4, hidden_size=8, ffn_hidden_size=12, num_attention_heads=2,
        num_query_groups=2, kv_channels=4, vocab_size=10,
    )  # fmt: skip
    scores = {n: torch.rand(12, generator=torch.Generator().manual_seed(n)) + n for n in range(4)}

    def draw(rules: Nonuniform | None, ranks: int = 1, **targets: object):
        return make_plan(
            shape, Targets(ffn_hidden_size=6, drop_layers=(1,), **targets),
            lambda axis, size, layer, seed: scores[layer], criterion_name="x", seed=1,
            prune_type="balance", balance_for=ranks, source_digest="d", nonuniform=rules,
        )  # fmt: skip

    plan = draw(Nonuniform(floor=0.5, scores="raw", multiple=3))
    assert not plan.uniform and plan.target.ffn_per_layer == (3, 3, 12)
    assert plan.target.ffn_hidden_size == 12
    assert plan.kept.ffn == {
        0: keep_top(scores[0], 3),
        2: keep_top(scores[2], 3),
        3: tuple(range(12)),
    }
    balanced = draw(Nonuniform(floor=0.5, scores="raw"), ranks=2)
    for layer, kept in balanced.kept.ffn.items():
        assert sum(i < 6 for i in kept) * 2 == len(kept), layer
    even = draw(Nonuniform(floor=1))
    assert even == draw(None) and even.uniform and even.target.ffn_per_layer is None
