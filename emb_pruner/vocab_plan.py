"""The decision as a file: which tokens of which tokenizer stay.

One permutation serves the tokenizer's files and the rows of the model: the kept ids in ascending
order, so that a token's new id is its place among them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from emb_pruner.forest import Forest
from megatron_prune.errors import PlanError
from megatron_prune.parsing import checked_as, read_json

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class VocabPlan:
    """Attributes:
    kept: ids of the source tokenizer, ascending.
    source_size: tokens of the source tokenizer, added ones included; a model may have more rows.
    tokenizer_digest: of the source tokenizer, as `megatron_prune.data.tokenizers` has it.
    method: how the tokens were chosen.
    balance_for: TP size for which no padding is needed.
    reasons: how many tokens stay for which reason.
    """

    kept: tuple[int, ...]
    source_size: int
    tokenizer_digest: str
    method: str
    balance_for: int = 1
    reasons: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.kept or self.kept[0] < 0 or self.kept[-1] >= self.source_size:
            raise PlanError(f"kept: wanted ids from 0 to {self.source_size - 1}, at least one")
        if any(a >= b for a, b in pairwise(self.kept)):
            raise PlanError("kept: not sorted, or an id stands twice")

    @property
    def size(self) -> int:
        return len(self.kept)

    @cached_property
    def new_ids(self) -> dict[int, int]:
        """Old id -> new id, of kept tokens."""
        return {old: new for new, old in enumerate(self.kept)}

    def to_json(self) -> str:
        values = {
            "version": VERSION,
            "tokenizer_digest": self.tokenizer_digest,
            "source_size": self.source_size,
            "size": self.size,
            "method": self.method,
            "balance_for": self.balance_for,
            "reasons": dict(self.reasons),
            "kept": list(self.kept),
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        return "{\n" + ",\n".join(lines) + "\n}\n"


def load_vocab_plan(path: Path) -> VocabPlan:
    """Read a plan file.

    Raises:
        PlanError: missing, not a vocabulary plan, another version, or one that contradicts itself.
    """
    values = read_json(path, PlanError, flag="--plan", unique=True)
    with checked_as(PlanError, f"--plan {path}", "not a vocabulary plan"):
        if values["version"] != VERSION:
            raise PlanError(f"version {values['version']!r}; this reads version {VERSION}")
        kept = values["kept"]
        if not isinstance(kept, list):
            raise TypeError(f"kept is a {type(kept).__name__}")
        if not all(type(token) is int for token in kept):
            raise PlanError("kept: holds something other than integers")
        plan = VocabPlan(
            kept=tuple(kept),
            source_size=int(values["source_size"]),
            tokenizer_digest=str(values["tokenizer_digest"]),
            method=str(values["method"]),
            balance_for=int(values["balance_for"]),
            reasons={str(key): int(count) for key, count in values["reasons"].items()},
        )
        if plan.size != values["size"]:
            raise PlanError(f"size says {values['size']}, kept has {plan.size} tokens")
        return plan


def check_fits(plan: VocabPlan, forest: Forest, digest: str, name: str) -> None:
    """Refuse a plan that does not keep the promises of `forest`.

    Args:
        digest: of the tokenizer at hand.
        name: where it was read, for messages.

    Raises:
        PlanError: made for another tokenizer, without a mandatory token, or not closed.
    """
    if plan.tokenizer_digest != digest or plan.source_size != forest.size:
        raise PlanError(
            f"tokenizer {name}: the plan was made for another one ({plan.source_size} tokens, "
            f"{plan.tokenizer_digest[:12]}; here {forest.size}, {digest[:12]}); plan again"
        )
    kept = set(plan.kept)
    if missing := sorted(forest.required - kept):
        raise PlanError(
            f"tokenizer {name}: the plan drops {len(missing)} tokens that have to stay "
            f"({', '.join(map(str, missing[:8]))}...); plan again"
        )
    if missing := sorted(forest.unreachable(kept)):
        raise PlanError(
            f"tokenizer {name}: the plan keeps {len(missing)} tokens without what they are merged "
            f"from ({', '.join(map(str, missing[:8]))}...); plan again"
        )
