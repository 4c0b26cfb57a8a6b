"""tiktoken's files: ``base64(bytes) rank`` lines, rank being priority and id at once.

Pattern and special tokens stand in the code of a model's author, which is never run:
`RANK_FAMILIES` has those that are known.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.errors import ConfigError, DamagedError

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]


@dataclass(frozen=True, kw_only=True)
class RankFamily:
    """Attributes:
    pattern: cuts a text into units.
    normal_form: of Unicode, applied before; None for none.
    specials: special tokens, numbered after the ranks.
    end: the one that ends a document.
    """

    pattern: str
    normal_form: NormalForm | None
    specials: tuple[str, ...]
    end: str


# tokenization_qwen.py of Qwen/Qwen-7B; the names of transformers' Qwen2 tokenizer are others.
_QWEN = RankFamily(
    pattern=(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    normal_form="NFC",
    specials=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *(f"<|extra_{number}|>" for number in range(205)),
    ),
    end="<|endoftext|>",
)
RANK_FAMILIES = {"qwen": _QWEN}
_LINE, _LONGEST = re.compile(rb"[A-Za-z0-9+/]+=* \d+\s*$"), 1 << 10


def family_of(file: Path) -> RankFamily:
    """The family that a file's name tells.

    Raises:
        ConfigError: none that is known.
    """
    for name, family in RANK_FAMILIES.items():
        if name in file.name.lower():
            return family
    raise ConfigError(
        f"tokenizer {file}: its pattern and special tokens are in code, which is not run; known "
        f"are those of {', '.join(RANK_FAMILIES)}, by the file's name"
    )


def is_ranks(path: Path) -> bool:
    """Whether a file begins as one of ranks does, whatever its name."""
    with open(path, "rb") as file:
        return _LINE.match(file.readline(_LONGEST)) is not None


def read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes -> rank, in the order of the file.

    Raises:
        DamagedError: not a file of ranks, or one that says two things.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DamagedError(
                f"tokenizer {path}: line {number}: found {line[:40]!r}, wanted base64 and a "
                "rank; copy it again from its source"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise DamagedError(
            f"tokenizer {path}: {len(ranks)} ranks that are not 0 to {len(ranks) - 1}, each once; "
            "copy it again from its source"
        )
    return ranks


def pruned_ranks(ranks: Mapping[bytes, int], plan: VocabPlan) -> bytes:
    """The file of the kept ranks, renumbered."""
    kept = sorted((plan.new_ids[id], token) for token, id in ranks.items() if id in plan.new_ids)
    return b"".join(base64.b64encode(token) + b" %d\n" % id for id, token in kept)
