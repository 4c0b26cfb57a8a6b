"""A tokenizer.json for the kept tokens: the model's table and every id in the parts around it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.errors import ConfigError, PlanError


def pruned_document(
    document: Mapping[str, Any], ids: Mapping[str, int], plan: VocabPlan
) -> dict[str, Any]:
    """The document with the kept tokens and their new ids; nothing else differs.

    Args:
        document: of the source.
        ids: token -> id as the library reads the source; a document's own ids of added tokens are
            only a hint to it.
    """
    model = document["model"]
    pruned = dict(document)
    if model.get("type") == "Unigram":
        pruned["model"] = _pruned_unigram(model, plan)
    else:
        pruned["model"] = _pruned_bpe(model, plan)
    pruned["added_tokens"] = sorted(
        (
            {**token, "id": plan.new_ids[ids[token["content"]]]}
            for token in document.get("added_tokens") or []
        ),
        key=lambda token: token["id"],
    )
    pruned["post_processor"] = _renumbered(document.get("post_processor"), plan)
    if padding := document.get("padding"):
        pruned["padding"] = {**padding, "pad_id": _new_id(plan, padding["pad_id"], "padding")}
    return pruned


def _pruned_bpe(model: Mapping[str, Any], plan: VocabPlan) -> dict[str, Any]:
    vocab = {
        token: plan.new_ids[id]
        for token, id in sorted(model["vocab"].items(), key=lambda item: item[1])
        if id in plan.new_ids
    }
    merges = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        if left in vocab and right in vocab and left + right in vocab:
            merges.append(merge)
    return {**model, "vocab": vocab, "merges": merges}


def _pruned_unigram(model: Mapping[str, Any], plan: VocabPlan) -> dict[str, Any]:
    vocab = [piece for id, piece in enumerate(model["vocab"]) if id in plan.new_ids]
    unknown = model.get("unk_id")
    new = None if unknown is None else _new_id(plan, unknown, "model.unk_id")
    return {**model, "vocab": vocab, "unk_id": new}


def _renumbered(part: Any, plan: VocabPlan) -> Any:
    """A post-processor with new ids, whichever of the library's kinds it is."""
    if not isinstance(part, dict):
        return part
    part = dict(part)
    kind = part["type"]
    if kind == "Sequence":
        part["processors"] = [_renumbered(inner, plan) for inner in part["processors"]]
    elif kind == "TemplateProcessing":
        part["special_tokens"] = {
            name: {**token, "ids": [_new_id(plan, id, name) for id in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for role in ("sep", "cls"):
            token, id = part[role]
            part[role] = [token, _new_id(plan, id, token)]
    elif kind != "ByteLevel":
        raise ConfigError(f"tokenizer.json: the ids in a {kind} post-processor are unknown")
    return part


def _new_id(plan: VocabPlan, id: int, name: str) -> int:
    if id not in plan.new_ids:
        raise PlanError(
            f"the plan drops token {id}, which the tokenizer's {name} needs; keep it "
            "(--keep-file) and plan again"
        )
    return plan.new_ids[id]


def dump_document(document: Mapping[str, Any]) -> str:
    """As the library writes it: two spaces deep, characters as they are."""
    return json.dumps(document, ensure_ascii=False, indent=2) + "\n"


def check_numbers(text: str, ids: Mapping[str, int], plan: VocabPlan) -> None:
    """Read what is to be written and compare every token's id with the plan's.

    Args:
        text: of the new tokenizer.json.
        ids: token -> id of the source.

    Raises:
        ConfigError: the library numbers added tokens by itself where the source's table has gaps.
    """
    from tokenizers import Tokenizer

    found = Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    wanted = {token: plan.new_ids[id] for token, id in ids.items() if id in plan.new_ids}
    for token, id in sorted(wanted.items(), key=lambda item: item[1]):
        if found.get(token) != id:
            raise ConfigError(
                f"tokenizer.json: token {token!r} would get id {found.get(token)} for {id}; the "
                "source's ids have gaps, write its added tokens into model.vocab first"
            )
    assert len(found) == len(wanted), (len(found), len(wanted))


def write_files(files: Mapping[str, bytes], directory: Path) -> list[str]:
    """Write each under its name; the names, sorted."""
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return sorted(files)
