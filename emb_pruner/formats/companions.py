"""The other files of a tokenizer's directory: the same vocabulary in older forms, roles, templates.

All are written from one plan, so that every form gives the same ids. Code of a tokenizer's author
is copied, never run; the one number in Qwen's that depends on the vocabulary is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emb_pruner.config_ids import renumber
from emb_pruner.forest import Parts
from emb_pruner.formats.rank_files import pruned_ranks, read_ranks
from emb_pruner.formats.sentencepiece import (
    NORMAL,
    SentencePiece,
    fixed_pieces,
    pruned_model,
    read_model,
)
from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.parsing import read_table

_COPIED = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
SENTENCEPIECE = re.compile(r"\.model(\.v\w+)?$")  # the names of such files
_FIRST_SPECIAL = re.compile(r"^SPECIAL_START_ID = (\d+)$", re.MULTILINE)


def sentencepiece_files(folder: Path) -> list[Path]:
    """``*.model``, and Mistral's ``*.model.v3`` and so on."""
    return sorted(file for file in folder.iterdir() if SENTENCEPIECE.search(file.name))


def _object(file: Path) -> dict[str, Any]:
    return read_table(
        file, DamagedError, "cannot be read", flag="tokenizer", advice="; copy it again"
    )


def _dump(values: Any) -> bytes:
    return (json.dumps(values, ensure_ascii=False, indent=2) + "\n").encode()


def fixed_by_companions(folder: Path, ids: Mapping[str, int]) -> dict[int, str]:
    """Tokens that have to stay for the SentencePiece form of the same vocabulary.

    Raises:
        ConfigError: it numbers its pieces in another way.
    """
    found: dict[int, str] = {}
    for file in sentencepiece_files(folder):
        proto = read_model(file)
        for id, piece in enumerate(proto.pieces):
            if piece.type == NORMAL and ids.get(piece.piece) != id:
                raise ConfigError(
                    f"tokenizer {file}: piece {piece.piece!r} has id {id} and in the directory's "
                    f"tokenizer {ids.get(piece.piece)}; prune without this file"
                )
        found |= fixed_pieces(proto)
    return found


def merged_otherwise(folder: Path, parts: Sequence[Parts | None]) -> dict[int, str]:
    """Tokens that the SentencePiece form merges from others than ``parts`` says, and those others.

    Pieces of one score merge from the left in SentencePiece and by a fixed order in `tokenizers`:
    Llama-2's runs of spaces. With all of them kept, a set is closed in both forms or in neither.
    """
    found: set[int] = set()
    for file in sentencepiece_files(folder):
        other, _ = SentencePiece(file, file).merged
        open_ = [
            token
            for token, (here, there) in enumerate(zip(parts, other))
            if here is not None and there is not None and here != there
        ]
        while open_:
            token = open_.pop()
            if token not in found:
                found.add(token)
                open_.extend(other[token] or ())
    return dict.fromkeys(found, "other form")


def pruned_companions(folder: Path, plan: VocabPlan) -> dict[str, bytes]:
    """What to write of ``folder``, tokenizer.json apart: name -> content."""
    files: dict[str, bytes] = {}
    for name, pruned in _PRUNED.items():
        if (folder / name).is_file():
            files[name] = pruned(folder / name, plan)
    for file in sentencepiece_files(folder):
        files[file.name] = pruned_model(read_model(file), plan)
    ranks: dict[bytes, int] = {}
    for file in sorted(folder.glob("*.tiktoken")):
        ranks = read_ranks(file)
        files[file.name] = pruned_ranks(ranks, plan)
    start = sum(id in plan.new_ids for id in ranks.values())
    for file in sorted(folder.glob("tokenization_*.py")):
        code = file.read_text(encoding="utf-8")
        files[file.name] = _FIRST_SPECIAL.sub(f"SPECIAL_START_ID = {start}", code).encode()
    for name in _COPIED:
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    return files


def _vocab(file: Path, plan: VocabPlan) -> bytes:
    kept = ((plan.new_ids[id], token) for token, id in _object(file).items() if id in plan.new_ids)
    return _dump({token: id for id, token in sorted(kept)})


def _merges(file: Path, plan: VocabPlan) -> bytes:
    vocab = _object(file.parent / "vocab.json")
    kept = {token for token, id in vocab.items() if id in plan.new_ids}
    lines = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        left, _, right = line.partition(" ")
        if line.startswith("#version") or (left in kept and right in kept and left + right in kept):
            lines.append(line)
    return ("\n".join(lines) + "\n").encode()


def _config(file: Path, plan: VocabPlan) -> bytes:
    config = _object(file)
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {
            str(plan.new_ids[int(id)]): token
            for id, token in config["added_tokens_decoder"].items()
            if int(id) in plan.new_ids
        }
    config = renumber(config, plan, str(file))
    if "vocab_size" in config:
        config["vocab_size"] = plan.size
    return _dump(config)


_PRUNED: Mapping[str, Callable[[Path, VocabPlan], bytes]] = {
    "vocab.json": _vocab,
    "merges.txt": _merges,
    "added_tokens.json": _vocab,
    "tokenizer_config.json": _config,
}
