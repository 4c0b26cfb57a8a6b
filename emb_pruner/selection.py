"""Which K tokens to keep, by how often a corpus has each.

All methods keep what is mandatory and a closed set: see `forest`. ``leaf`` takes tokens away from
the outside, the least frequent first; ``leaf-fertility`` the same with counts handed on to parts
(leaf-based vocabulary pruning, arXiv:2512.03989); ``closure`` adds the most frequent with their
parts; ``prefix`` adds the earliest learned and needs no corpus.

Handing counts on makes the fewest tokens. The default does not: what it keeps instead are parts
that the model has hardly ever met by themselves, and text then costs more bits
(docs/vocabulary.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from emb_pruner.forest import Forest
from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PRIOR = 1.0  # share of the corpus that the prior is worth


def with_prior(forest: Forest, counts_V: NDArray[np.int64], share: float) -> NDArray[np.float64]:
    """Counts as if the corpus had gone on for ``share`` of its length in the tokenizer's own.

    Of that the tokens' frequencies are taken as Zipf's law of their ranks, 1 / (rank + 10): it
    orders what a small corpus has not met.
    """
    weights_V = 1 / (np.asarray(forest.rank, dtype=np.float64) + 10)
    total = max(float(counts_V.sum()), 1.0)
    return counts_V + share * total * weights_V / weights_V.sum()


def leaf(
    forest: Forest, counts_V: NDArray[np.float64], size: int, *, hands_on: bool = False
) -> set[int]:
    """Take the cheapest leaf until ``size`` are left; a leaf is a part of no kept token.

    With ``hands_on`` its count goes to its parts: each time it came up, they do now, and a token's
    cost is what the corpus grows by when it goes.
    """
    kept = set(forest.usable)
    costs, children = counts_V.astype(np.float64), np.zeros(forest.size, dtype=np.int64)
    for token in kept:
        for part in forest.parts[token] or ():
            children[part] += 1

    def is_leaf(token: int) -> bool:
        return children[token] == 0 and token not in forest.mandatory

    def entry(token: int) -> tuple[float, int, int]:
        return float(costs[token]), -forest.rank[token], token

    heap = [entry(token) for token in kept if is_leaf(token)]
    heapq.heapify(heap)
    while len(kept) > size:
        _, _, token = heapq.heappop(heap)
        kept.discard(token)
        for part in forest.parts[token] or ():
            costs[part] += costs[token] * hands_on
            children[part] -= 1
        for part in set(forest.parts[token] or ()):
            if is_leaf(part):
                heapq.heappush(heap, entry(part))
    return kept


def _grow(forest: Forest, order: list[int], size: int) -> set[int]:
    """Add tokens in turn, each with its parts, while they fit."""
    kept = set(forest.required)
    while len(kept) < size:  # again for what was too large a step
        for token in order:
            more = forest.closure([token]) - kept
            if len(kept) + len(more) <= size:
                kept |= more
    return kept


def closure(forest: Forest, counts_V: NDArray[np.float64], size: int) -> set[int]:
    """The most frequent tokens, each with its parts."""
    order = sorted(forest.usable, key=lambda token: (-counts_V[token], forest.rank[token]))
    return _grow(forest, order, size)


def prefix(forest: Forest, counts_V: NDArray[np.float64], size: int) -> set[int]:
    """The tokens that were learned first; the counts are not looked at."""
    return _grow(forest, sorted(forest.usable, key=lambda token: forest.rank[token]), size)


METHODS: dict[str, Callable[[Forest, NDArray[np.float64], int], set[int]]] = {
    "leaf": leaf,
    "leaf-fertility": partial(leaf, hands_on=True),
    "closure": closure,
    "prefix": prefix,
}


def select(
    forest: Forest,
    size: int,
    *,
    method: str,
    counts_V: NDArray[np.int64] | None,
    prior: float = PRIOR,
) -> tuple[int, ...]:
    """The kept tokens, ascending: ``size`` of them.

    Args:
        counts_V: [V] int64, how often each token came up; None needs ``prefix``.

    Raises:
        ConfigError: a size below what is mandatory or above what there is, or no counts.
    """
    alive = len(forest.usable)
    if not len(forest.required) <= size <= alive:
        raise ConfigError(
            f"--vocab-size-remain {size}: {len(forest.required)} tokens have to stay and "
            f"{alive} of {forest.size} can be produced; wanted a size between"
        )
    if counts_V is None:
        if method != "prefix":
            raise ConfigError(f"--method {method} needs --counts; without them: --method prefix")
        counts_V = np.zeros(forest.size, dtype=np.int64)
    kept = METHODS[method](forest, with_prior(forest, counts_V, prior), size)
    assert len(kept) == size, (len(kept), size)
    return tuple(sorted(kept))
