"""Which decisions of a plan are within rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.margins import ROUNDING, Decision, decisions, renumbered, rounding_text
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Terms, combined
from tests.planning.test_choose import shape

Units = Callable[[str, int, int | None], Tensor]


def spread(axis: str, size: int, layer: int | None) -> Tensor:
    """Every unit clearly above the next."""
    return torch.arange(size, 0, -1, dtype=torch.float64)


def with_values(where: tuple[str, int | None], values: dict[int, float]) -> Units:
    """`spread` with other scores of some units of one axis and layer."""

    def scores(axis: str, size: int, layer: int | None) -> Tensor:
        x = spread(axis, size, layer)
        if (axis, layer) == where:
            x[list(values)] = torch.tensor([*values.values()], dtype=torch.float64)
        return x

    return scores


def terms_of(*each: Units) -> Terms:
    return lambda axis, size, layer: [(1.0, one(axis, size, layer)) for one in each]


def plan_of(terms: Terms, *, ranks: int = 1, **targets: Any) -> PrunePlan:
    def criterion(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
        return combined(terms(axis, size, layer))

    return make_plan(
        shape(), Targets(**targets), criterion, criterion_name="c", seed=0, prune_type="balance",
        balance_for=ranks, source_digest="d",
    )  # fmt: skip


def close(*each: Units, ranks: int = 1, **targets: Any) -> list[str]:
    """The decisions within rounding, as they are told."""
    terms = terms_of(*each)
    found = decisions(plan_of(terms, ranks=ranks, **targets), terms)
    return [str(decision) for decision in found if decision.is_close]


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
    lowest = float(spread(where[0], shape().size(where[0]), None)[kept])
    assert close(spread, **targets) == []
    for off, wanted in ((0.5, [says]), (1.5, [])):
        nudged = with_values(where, {dropped: lowest * (1 - off * ROUNDING)})
        assert close(nudged, **targets) == wanted


def test_exact_ties_count_and_so_do_scores_of_nothing_but_zeros() -> None:
    assert close(with_values(("D", None), {36: 13.0}), hidden_size=36) == ["hidden: 35 over 36"]
    zeros = close(lambda axis, size, layer: torch.zeros(size), hidden_size=36)
    assert zeros == ["hidden: 35 over 36"]


def test_heads_are_held_against_the_heads_of_their_group() -> None:
    """Two heads in each of three groups; a head as good as another group's is no close call."""
    alike = with_values(("Q", 3), {0: 9, 1: 1, 2: 9, 3: 1, 4: 9, 5: 9 * (1 - ROUNDING / 2)})
    assert close(alike, num_attention_heads=3) == ["heads of layer 3: 4 over 5"]
    both = close(alike, num_attention_heads=4, num_query_groups=2)
    assert both == []  # the kept groups keep both of their heads


def test_a_balance_rank_is_a_block_of_its_own() -> None:
    """The closest units of the layer lie on two ranks, which choose for themselves."""
    values = dict.fromkeys(range(96), 1.0)
    values |= {unit: 2.0 for first in (0, 32, 64) for unit in range(first, first + 16)}
    values |= {16: 2 - ROUNDING, 32 + 16: 1.5}  # of the first rank, and of the second
    scores = with_values(("F", 0), values)
    assert close(scores, ranks=3, ffn_hidden_size=48) == ["ffn of layer 0: 15 over 16"]
    assert close(scores, ffn_hidden_size=48) == ["ffn of layer 0: 79 over 16"]


def test_a_score_is_held_to_its_own_size() -> None:
    """Neither another layer's nor an outlier's beside it."""
    tiny = {unit: 1e-9 * (96 - unit) for unit in range(1, 96)}
    assert close(with_values(("F", 0), tiny | {0: 1e9}), ffn_hidden_size=60) == []
    negative = with_values(("L", None), {0: -1.0, 1: -100.0, 2: -100.0 - ROUNDING, 3: -200.0})
    assert close(negative, num_layers=2) == ["layers: 1 over 2"]


def test_a_composite_is_close_when_ranks_within_rounding_could_turn_it() -> None:
    """Equal sums of clear ranks go by index at any layout; a blurred rank may change its sum."""
    one = with_values(("L", None), {0: 4, 1: 3, 2: 2, 3: 1})
    other = with_values(("L", None), {0: 4, 1: 2, 2: 3, 3: 1})
    assert close(one, other, num_layers=2) == []  # 1 and 2 tie, both ranked clearly
    blurred = with_values(("L", None), {0: 4, 1: 3, 2: 3 * (1 - ROUNDING / 3), 3: 1})
    assert close(blurred, other, num_layers=2) == ["layers: 1 over 2"]
    assert close(blurred, blurred, num_layers=2) == ["layers: 1 over 2"]
    assert close(blurred, other, num_layers=3) == []


def test_layers_that_were_named_are_no_decision() -> None:
    terms = terms_of(spread)
    plan = plan_of(terms, drop_layers=(0,), hidden_size=36)
    assert {decision.axis for decision in decisions(plan, terms, "DQKF")} == {"D"}


def test_a_decision_about_a_pruned_model_is_told_in_the_sources_numbers() -> None:
    before = plan_of(terms_of(spread), drop_layers=(0,), ffn_hidden_size=60)
    about = {"axis": "F", "kept": 3, "dropped": 59, "is_close": True}
    found = renumbered(Decision(layer=1, **about), before)
    wanted = before.indices("F", 2)
    assert (found.layer, found.kept, found.dropped) == (2, wanted[3], wanted[59])
    layers = renumbered(Decision(axis="L", layer=None, kept=0, dropped=2, is_close=True), before)
    assert (layers.kept, layers.dropped) == (1, 3)


def test_the_message_counts_by_axis_and_names_the_first_few() -> None:
    ties = terms_of(lambda axis, size, layer: torch.ones(size))
    plan = plan_of(ties, hidden_size=36, num_attention_heads=3)
    assert rounding_text([*decisions(plan, terms_of(spread))]) is None
    assert rounding_text([*decisions(plan, ties)]) == (
        "13 of 13 decisions are within rounding (scores less than 1e-05 of themselves apart), "
        "1 on hidden, 12 on heads; another layout may take them the other way: "
        "hidden: 35 over 36, heads of layer 0: 0 over 1, heads of layer 0: 2 over 3, "
        "heads of layer 0: 4 over 5, and 9 more"
    )
