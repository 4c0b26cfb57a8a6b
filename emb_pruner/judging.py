"""What a pruned tokenizer makes of text, beside the one it came from.

Counted by units (words, roughly), each distinct one tokenised once. Nothing here is a model: for
that, compare bits per byte, which survives a change of vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from emb_pruner.formats import Vocabulary
from emb_pruner.vocab_plan import VocabPlan


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Of one text; units are counted as often as they come up.

    Attributes:
        bytes: of the text, in UTF-8.
        units: pieces that are tokenised by themselves.
        identical: those that encode to the same tokens, by their new ids.
        covered: those whose tokens were all kept.
        changed: covered units that encode to others all the same; 0 in a closed vocabulary.
        tokens_before, tokens_after: of the whole text.
    """

    bytes: int
    units: int
    identical: int
    covered: int
    changed: int
    tokens_before: int
    tokens_after: int

    @property
    def fertility(self) -> float:
        """Tokens after, for each one before."""
        return self.tokens_after / max(self.tokens_before, 1)


def judge(
    source: Vocabulary, pruned: Vocabulary, plan: VocabPlan, texts: Iterable[str]
) -> Judgement:
    """Tokenise with both; memory for the distinct units of the texts."""
    found: Counter[str] = Counter()
    size = 0
    for text in texts:
        size += len(text.encode())
        found.update(source.units(text))
    units, times = list(found), list(found.values())
    identical = covered = changed = before = after = 0
    for old, new, count in zip(source.encode_units(units), pruned.encode_units(units), times):
        mapped = [plan.new_ids.get(token) for token in old]
        before += count * len(old)
        after += count * len(new)
        identical += count * (mapped == new)
        covered += count * (None not in mapped)
        changed += count * (None not in mapped and mapped != new)
    return Judgement(
        bytes=size,
        units=sum(times),
        identical=identical,
        covered=covered,
        changed=changed,
        tokens_before=before,
        tokens_after=after,
    )


def dead_tokens(source: Vocabulary, pruned: Vocabulary, plan: VocabPlan) -> list[int]:
    """Kept tokens, by their old ids, that can no longer be produced and could be before."""
    return sorted(
        plan.kept[token]
        for token in pruned.forest.dead
        if plan.kept[token] not in source.forest.dead
    )
