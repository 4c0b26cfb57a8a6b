"""The promises of vocabulary pruning, as counts of what was checked and what was broken."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.selection import select
from emb_pruner.vocab_plan import VocabPlan


def plan_of(vocabulary: Vocabulary, kept: Iterable[int]) -> VocabPlan:
    return VocabPlan(
        kept=tuple(sorted(kept)),
        source_size=vocabulary.forest.size,
        tokenizer_digest=vocabulary.digest,
        method="test",
    )


def some_plan(vocabulary: Vocabulary, size: int) -> VocabPlan:
    """A closed set that is not simply the earliest tokens: leaves of random counts are taken."""
    import numpy as np

    counts = np.random.default_rng(0).integers(0, 1000, vocabulary.forest.size)
    return plan_of(vocabulary, select(vocabulary.forest, size, method="leaf", counts_V=counts))


def unclosed_plan(vocabulary: Vocabulary, size: int) -> VocabPlan:
    """Mandatory tokens and others at random, without their parts."""
    forest = vocabulary.forest
    others = sorted(set(range(forest.size)) - forest.required - forest.dead)
    others = random.Random(0).sample(others, size - len(forest.required))
    return plan_of(vocabulary, forest.required | set(others))


def write(vocabulary: Vocabulary, plan: VocabPlan, folder: Path) -> Vocabulary:
    """The pruned vocabulary, read from its files, in the form of the source."""
    folder.mkdir(exist_ok=True)
    vocabulary.write(plan, folder)
    return open_vocabulary(vocabulary.written(folder))


def write_unchecked(vocabulary: Vocabulary, plan: VocabPlan, folder: Path) -> Vocabulary:
    folder.mkdir(exist_ok=True)
    for name, content in vocabulary.files(plan).items():  # type: ignore[attr-defined]
        (folder / name).write_bytes(content)
    return open_vocabulary(vocabulary.written(folder))


def strange_texts(vocabulary: Vocabulary, count: int, seed: int = 0) -> Iterator[str]:
    """Tokens one after the other without regard to sense, with characters of all planes between."""
    rng = random.Random(seed)
    size = vocabulary.forest.size
    for _ in range(count):
        pieces = []
        for _ in range(rng.randrange(1, 6)):
            ids = [rng.randrange(size) for _ in range(rng.randrange(1, 4))]
            pieces.append(vocabulary.decode(ids).replace("\ufffd", ""))
            pieces.append(rng.choice(["", "", " ", "  ", "\n", "\t\n", "1", "'s", "\u00a0"]))
            if rng.random() < 0.1:
                pieces.append(
                    chr(rng.choice([rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x2FFFF)]))
                )
        yield "".join(pieces)


def broken_units(
    source: Vocabulary,
    pruned: Vocabulary,
    plan: VocabPlan,
    texts: Iterable[str],
    seen: set[str] | None = None,
) -> tuple[int, list[str]]:
    """Units whose tokens are all kept: how many different ones, and those that changed.

    Args:
        seen: those that were looked at before; the new ones are added.
    """
    seen = set() if seen is None else seen
    checked, broken = 0, []
    names = sorted({unit for text in texts for unit in source.units(text)} - seen)
    seen.update(names)
    for unit, old, new in zip(names, source.encode_units(names), pruned.encode_units(names)):
        if all(id in plan.new_ids for id in old):
            checked += 1
            if [plan.new_ids[id] for id in old] != new:
                broken.append(unit)
    return checked, broken


def texts_that_change(source: Vocabulary, pruned: Vocabulary, texts: list[str]) -> list[str]:
    """Texts that the pruned tokenizer does not give back as the source does."""
    pairs = zip(texts, source.encode(texts), pruned.encode(texts))
    return [text for text, old, new in pairs if source.decode(old) != pruned.decode(new)]
