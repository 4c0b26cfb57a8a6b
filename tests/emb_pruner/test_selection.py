"""Which tokens stay: closed sets of the size asked for, the cheapest given up first."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from emb_pruner.forest import Forest, last_merge
from emb_pruner.selection import METHODS, select, with_prior
from megatron_prune.errors import ConfigError

# ids 0-3 are atoms; 4 = 0 1, 5 = 2 3, 6 = 4 5, 7 = 4 2, 8 = 1 1
PARTS = (None, None, None, None, (0, 1), (2, 3), (4, 5), (4, 2), (1, 1))


def forest(dead: frozenset[int] = frozenset()) -> Forest:
    return Forest(
        parts=PARTS, rank=tuple(range(9)), mandatory=dict.fromkeys(range(4), "byte"), dead=dead
    )


def grown(seed: int, size: int = 120) -> Forest:
    """A forest of which each token is merged from two that came before."""
    rng = random.Random(seed)
    parts: list[tuple[int, int] | None] = [None] * 20
    while len(parts) < size:
        parts.append((rng.randrange(len(parts)), rng.randrange(len(parts))))
    return Forest(
        parts=tuple(parts),
        rank=tuple(range(size)),
        mandatory=dict.fromkeys(range(10), "byte"),
        dead=frozenset(rng.sample(range(20, size), 5)),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(8))
def test_what_stays_is_closed_and_of_the_size_asked_for(method: str, seed: int) -> None:
    rng, trees = np.random.default_rng(seed), grown(seed)
    counts = rng.zipf(1.5, trees.size)
    smallest = len(trees.required)
    largest = len(trees.closure(set(range(trees.size)) - trees.dead))
    for size in (smallest, smallest + 1, (smallest + largest) // 2, largest):
        kept = select(trees, size, method=method, counts_V=counts)
        assert len(kept) == size and list(kept) == sorted(kept)
        assert trees.unreachable(set(kept)) == set()
        assert trees.required <= set(kept)


def test_a_dead_token_stays_only_as_a_part() -> None:
    kept = select(forest(frozenset({4, 8})), 8, method="prefix", counts_V=None)
    assert 4 in kept and 8 not in kept
    with pytest.raises(ConfigError, match="4 tokens have to stay and 8 of 9"):
        select(forest(frozenset({4, 8})), 9, method="prefix", counts_V=None)


def cost(kept: set[int], counts: list[int]) -> int:
    """Tokens that a corpus takes when dropped tokens become their parts."""

    def pieces(token: int) -> int:
        parts = PARTS[token]
        return 1 if token in kept or parts is None else sum(map(pieces, parts))

    return sum(count * pieces(token) for token, count in enumerate(counts))


@pytest.mark.parametrize("seed", range(20))
def test_handing_on_gives_up_what_costs_least(seed: int) -> None:
    """Against every closed set of that size; where greedy steps cannot err: one token less."""
    counts = random.Random(seed).sample(range(1, 100), 9)
    kept = METHODS["leaf-fertility"](forest(), np.array(counts, dtype=np.float64), 8)
    sets = [set(s) for s in itertools.combinations(range(9), 8)]
    closed = [s for s in sets if forest().unreachable(s) == set() and s >= set(range(4))]
    assert cost(kept, counts) == min(cost(s, counts) for s in closed)


def test_a_dropped_token_hands_its_count_to_its_parts() -> None:
    counts = np.array([0, 0, 0, 0, 1, 2, 10, 5, 12], dtype=np.float64)
    # 7 (5) goes, then 6 (10); then 5 has 2 + 10 and 4 has 1 + 5 + 10, so of 5 and 8 the later goes
    assert METHODS["leaf-fertility"](forest(), counts, 6) == {0, 1, 2, 3, 4, 5}
    # by their own counts 4 (1) and 5 (2) go, and 8 (12) stays
    assert METHODS["leaf"](forest(), counts, 6) == {0, 1, 2, 3, 5, 8}
    assert METHODS["leaf"](forest(), counts, 5) == {0, 1, 2, 3, 8}


def test_the_prior_orders_what_was_not_met_and_no_more() -> None:
    counts = np.zeros(9, dtype=np.int64)
    counts[8] = 1000
    smoothed = with_prior(forest(), counts, 0.05)
    assert smoothed[8] > smoothed[4] > smoothed[5] > smoothed[6] > 0
    assert smoothed.sum() == pytest.approx(1050)
    assert (with_prior(forest(), counts, 0) == counts).all()


def test_counts_are_needed_but_for_prefix() -> None:
    assert select(forest(), 6, method="prefix", counts_V=None) == (0, 1, 2, 3, 4, 5)
    with pytest.raises(ConfigError, match="needs --counts"):
        select(forest(), 6, method="leaf", counts_V=None)


@pytest.mark.parametrize("size", [3, 10])
def test_a_size_that_cannot_be_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"--vocab-size-remain {size}: 4 tokens have to stay"):
        select(forest(), size, method="prefix", counts_V=None)


def test_merging_takes_the_lowest_priority_and_of_equals_the_leftmost() -> None:
    table = {(0, 0): (0.0, 1), (1, 1): (1.0, 2), (1, 0): (2.0, 3)}
    merge = lambda a, b: table.get((a, b))  # noqa: E731
    assert last_merge([0, 0, 0, 0], merge) == ([2], (1, 1))
    assert last_merge([0, 0, 0], merge) == ([3], (1, 0))
    assert last_merge([0], merge) == ([0], None)
    assert last_merge([2, 0], merge) == ([2, 0], None)
