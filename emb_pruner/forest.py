"""What each token of a BPE tokenizer is merged from, which must stay, and which never come up.

A BPE token can be produced only if the two tokens that its last merge joins can be: a forest, with
single bytes or characters as its roots. With a **closed** set of tokens kept (each with its parts),
every unit whose original tokens are all kept takes the same merges in the same order, since every
token on the way is a part of the ones it ends with, and no merge was added: it encodes to the same
tokens. Without closure tokens stay that nothing produces, and units change though their tokens were
all kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

Parts = tuple[int, int]
Merge = Callable[[int, int], tuple[float, int] | None]


@dataclass(frozen=True, kw_only=True)
class Forest:
    """The tokens of one tokenizer, by id.

    Attributes:
        parts: the two tokens each is merged from; None for an atom: a byte, a character, a special
            token, or one that is found whole.
        rank: how early each was learned, 0 first: the order to keep them in without a corpus.
        mandatory: tokens that have to stay, each with the reason: ``special``, ``byte``,
            ``character`` or another word for reports.
        dead: tokens that no text encodes to, of which none is mandatory; they serve others as parts
            at most.
    """

    parts: tuple[Parts | None, ...]
    rank: tuple[int, ...]
    mandatory: Mapping[int, str]
    dead: frozenset[int]

    @property
    def size(self) -> int:
        return len(self.parts)

    def closure(self, tokens: Iterable[int]) -> set[int]:
        """The tokens and everything that they are merged from."""
        found: set[int] = set()
        open_ = list(tokens)
        while open_:
            token = open_.pop()
            if token not in found:
                found.add(token)
                open_.extend(self.parts[token] or ())
        return found

    @cached_property
    def required(self) -> frozenset[int]:
        """The mandatory tokens, closed: the smallest vocabulary there is."""
        return frozenset(self.closure(self.mandatory))

    @cached_property
    def usable(self) -> frozenset[int]:
        """Tokens that come up, and what they are merged from: that alone may never come up."""
        return frozenset(self.closure(set(range(self.size)) - self.dead))

    def unreachable(self, kept: set[int]) -> set[int]:
        """Those of the kept tokens that miss a part, at any depth."""
        return {token for token in kept if not self.closure([token]) <= kept}


def last_merge(symbols: list[int], merge: Merge) -> tuple[list[int], Parts | None]:
    """Merge as BPE does: the pair with the lowest priority first, of equals the leftmost.

    Args:
        symbols: the atoms of one unit.
        merge: (left, right) -> (priority, token), None where they do not merge.

    Returns:
        What is left, and the pair that was merged last (None: nothing was).
    """
    symbols, last = list(symbols), None
    pairs = [merge(a, b) for a, b in pairwise(symbols)]
    while found := [(pair[0], at) for at, pair in enumerate(pairs) if pair is not None]:
        _, at = min(found)
        pair = pairs[at]
        assert pair is not None
        last = symbols[at], symbols[at + 1]
        symbols[at : at + 2] = [pair[1]]
        pairs[at : at + 1] = []
        for near in (at - 1, at):
            if 0 <= near < len(pairs):
                pairs[near] = merge(symbols[near], symbols[near + 1])
    return symbols, last
