"""The forest of a vocabulary, by tokenising each token alone.

A token that its own atoms do not merge to never comes up, in no context: merges inside of it are
the same alone and amid a text. Whether a text can bring its atoms together at all (a normaliser
changes them, a pretokeniser cuts between them) is then tried on texts around it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import product

from emb_pruner.forest import Forest, Merge, Parts, last_merge

Encode = Callable[[Sequence[str]], list[list[int]]]

_AROUND = ("", "a", " ", "1", ".", "\n")
_BATCH = 10_000


def never_found(encode: Encode, texts: Mapping[int, str]) -> set[int]:
    """Those tokens that come up in none of some texts made around their own."""
    missing = dict(texts)
    for before, after in product(_AROUND, _AROUND):
        tokens = list(missing)
        for start in range(0, len(tokens), _BATCH):
            batch = tokens[start : start + _BATCH]
            found = encode([before + missing[token] + after for token in batch])
            for token, ids in zip(batch, found):
                if token in ids:
                    del missing[token]
    return set(missing)


def bpe_parts(
    atoms: Mapping[int, Sequence[int]], merge: Merge, size: int
) -> tuple[list[Parts | None], set[int]]:
    """What each token is merged from, and the tokens that their own atoms do not merge to.

    Args:
        atoms: of each token that merges can make; ids from ``size`` on are characters outside of
            the vocabulary, which SentencePiece merges as well.
        merge: see `last_merge`.
        size: of the vocabulary.
    """
    parts: list[Parts | None] = [None] * size
    unmade: set[int] = set()
    for token, symbols in atoms.items():
        left, last = last_merge(list(symbols), merge)
        if left != [token]:
            unmade.add(token)
        elif last is not None:
            known = [part for part in last if part < size]
            parts[token] = (known[0], known[-1]) if known else None
    return parts, unmade


def forest(
    *,
    parts: Sequence[Parts | None],
    order: Sequence[float],
    mandatory: Mapping[int, str],
    dead: Collection[int],
) -> Forest:
    """See `Forest`; of equals in ``order`` the lower id was learned first."""
    rank = [0] * len(parts)
    for place, token in enumerate(sorted(range(len(parts)), key=lambda id: (order[id], id))):
        rank[token] = place
    return Forest(
        parts=tuple(parts),
        rank=tuple(rank),
        mandatory=dict(mandatory),
        dead=frozenset(dead) - mandatory.keys(),
    )
