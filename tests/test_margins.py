"""Which decisions of a plan are within rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.margins import ROUNDING, Decision, decisions, rounding_text
from megatron_prune.plan import PrunePlan
from megatron_prune.planning import Targets, make_plan
from tests.test_planning import shape

CLOSE = ROUNDING / 2


def spread(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
    """Every unit clearly above the next."""
    return torch.arange(size, 0, -1, dtype=torch.float64)


def nudged(where: tuple[str, int | None], values: dict[int, float]) -> Any:
    """`spread` with other scores of some units of one axis and layer."""

    def scores(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
        x = spread(axis, size, layer, seed)
        if (axis, layer) == where:
            for unit, value in values.items():
                x[unit] = value
        return x

    return scores


def plan_of(criterion: Any, *, ranks: int = 1, **targets: Any) -> PrunePlan:
    return make_plan(
        shape(), Targets(**targets), criterion, criterion_name="c", seed=0, prune_type="balance",
        balance_for=ranks, source_digest="d",
    )  # fmt: skip


def close(criterion: Any, *, ranks: int = 1, **targets: Any) -> list[Decision]:
    found = decisions(plan_of(criterion, ranks=ranks, **targets), criterion)
    return [decision for decision in found if decision.margin < ROUNDING]


@pytest.mark.parametrize(
    ("where", "targets", "dropped", "kept", "says"),
    [
        (("D", None), {"hidden_size": 36}, 36, 35, "hidden: 35 over 36"),
        (("F", 2), {"ffn_hidden_size": 60}, 60, 59, "ffn of layer 2: 59 over 60"),
        (("K", 1), {"num_query_groups": 2}, 2, 1, "query-groups of layer 1: 1 over 2"),
        (("L", None), {"num_layers": 3}, 3, 2, "layers: 2 over 3"),
    ],
)
def test_a_unit_just_below_the_lowest_kept_is_within_rounding(
    where: tuple[str, int | None], targets: dict[str, int], dropped: int, kept: int, says: str
) -> None:
    lowest = float(spread(where[0], shape().size(where[0]), None, 0)[kept])
    largest = float(shape().size(where[0]))
    assert close(spread, **targets) == []
    found = close(nudged(where, {dropped: lowest - CLOSE * largest}), **targets)
    assert [str(decision) for decision in found] == [says]
    assert found[0].margin == pytest.approx(CLOSE, rel=1e-3)
    assert close(nudged(where, {dropped: lowest - 3 * CLOSE * largest}), **targets) == []


def test_an_exact_tie_counts_and_so_do_scores_of_nothing_but_zeros() -> None:
    tie = close(nudged(("D", None), {36: 13.0}), hidden_size=36)
    assert [(d.kept, d.dropped, d.margin) for d in tie] == [(35, 36, 0.0)]
    zeros = close(lambda axis, size, layer, seed: torch.zeros(size), hidden_size=36)
    assert [d.margin for d in zeros] == [0.0]


def test_heads_are_held_against_the_heads_of_their_group() -> None:
    """Two heads in each of three groups; a head as good as another group's is no close call."""
    alike = nudged(("Q", 3), {0: 9.0, 1: 1.0, 2: 9.0, 3: 1.0, 4: 9.0, 5: 9.0 * (1 - CLOSE)})
    found = close(alike, num_attention_heads=3)
    assert [str(decision) for decision in found] == ["heads of layer 3: 4 over 5"]
    without = close(alike, num_attention_heads=4, num_query_groups=2)
    assert without == []  # the kept groups keep both of their heads


def test_a_balance_rank_is_a_block_of_its_own() -> None:
    """The closest units of the layer lie on two ranks, which choose for themselves."""
    values = dict.fromkeys(range(96), 1.0)
    values |= {unit: 2.0 for first in (0, 32, 64) for unit in range(first, first + 16)}
    values |= {16: 2.0 - 1.5 * CLOSE}  # of the first of three ranks
    criterion = nudged(("F", 0), values)
    balanced = close(criterion, ranks=3, ffn_hidden_size=48)
    assert [str(decision) for decision in balanced] == ["ffn of layer 0: 0 over 16"]
    assert close(criterion, ffn_hidden_size=51)[0].dropped == 19  # one block: ties of ones


def test_the_margin_is_a_share_of_the_blocks_largest_absolute_score() -> None:
    small = nudged(("F", 0), {unit: 1e-9 * (96 - unit) for unit in range(96)})
    assert close(small, ffn_hidden_size=60) == []  # small beside other layers, clear by themselves
    negative = nudged(("L", None), {0: -100.0, 1: -1.0, 2: -1.0002, 3: -1.0004})
    assert [str(d) for d in close(negative, num_layers=2)] == ["layers: 2 over 3"]


def test_layers_that_were_named_are_no_decision() -> None:
    plan = plan_of(spread, drop_layers=(0,), hidden_size=36)
    assert {decision.axis for decision in decisions(plan, spread, "DQKF")} == {"D"}


def test_the_message_counts_by_axis_and_names_the_first_few() -> None:
    def ties(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
        return torch.ones(size)

    plan = plan_of(ties, hidden_size=36, num_attention_heads=3)
    assert rounding_text([*decisions(plan, spread)]) is None
    assert rounding_text([*decisions(plan, ties)]) == (
        "13 of 13 decisions are within rounding (less than 1e-05 of the largest score beside "
        "them), 1 on hidden, 12 on heads; another layout may take them the other way: "
        "hidden: 0 over 36, heads of layer 0: 0 over 1, heads of layer 0: 2 over 3, "
        "heads of layer 0: 4 over 5, and 9 more"
    )
