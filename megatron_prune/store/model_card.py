"""The model card: README.md of a Hugging Face directory, from what the checkpoint itself says.

It names what the model was made from, its shapes, the plan, repair, gates, zeros and training that
made it, with their digests and commands, and how to load it. A card that the source has is one of
another model: it is replaced, and gives its licence, language and kind of task to the new one. A
card of ours gives the base model too. What nothing says is left out; nothing is asked of a hub. In
a Megatron checkpoint it lies in ``hf/`` with all that travels, and every stage that writes one
renews it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import yaml

from megatron_prune.errors import ConfigError
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.folding_record import Folding
from megatron_prune.sources.source import FOLDING, SPARSITY, Source
from megatron_prune.sources.sparsity_record import Sparsity, parse_pattern

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

TAG = "megatron-prune"  # how our cards are told from others
_CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card is made of.

    Attributes:
        config: of the model as it is written.
        plan, plan_digest: of its pruning, None when it was not pruned.
        is_repaired: other tensors than the planned slices stand in it.
        folding: the record of the gates in its weights, None where there were none.
        sparsity: the record of the zeros that were set in it, None where none were.
        commands: lines of the training runs' ``commands.jsonl``, oldest first.
        source_card: the source's README.md, None when it has none.
        base_model: hub name of the model it all began with, None when nobody says.
    """

    config: ModelConfig
    plan: PrunePlan | None = None
    plan_digest: str | None = None
    is_repaired: bool = False
    folding: Folding | None = None
    sparsity: Sparsity | None = None
    commands: Sequence[str] = ()
    source_card: bytes | None = None
    base_model: str | None = None


def read_card(card: bytes | None) -> dict[str, Any]:
    """The values of a card's YAML header; empty when there is no card, or no header in it."""
    text = "" if card is None else card.decode(errors="replace").lstrip("\N{BYTE ORDER MARK}")
    if not text.startswith("---"):
        return {}
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except (ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError):
        return {}  # somebody else's mistake, in what we replace


def is_ours(card: bytes | None) -> bool:
    """Whether a card was written here."""
    return _has_our_tag(read_card(card))


def _has_our_tag(header: Mapping[str, Any]) -> bool:
    tags = header.get("tags")
    return isinstance(tags, list) and TAG in tags


def base_model_of(source: Source) -> str | None:
    """The hub name of a source in the hub's cache, ``models--ORG--NAME/snapshots/REVISION``."""
    snapshots = source.path.absolute().parent
    name = snapshots.parent.name
    if source.format != "hf" or snapshots.name != "snapshots" or not name.startswith("models--"):
        return None
    return name.removeprefix("models--").replace("--", "/")


def check_hub_name(flag: str, name: str) -> None:
    """Raises:
    ConfigError: a hub would not have this name.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{flag} {name}: {said}; wanted a name such as org/model") from None


def model_card(facts: CardFacts) -> bytes:
    """The text of README.md; the same facts give the same bytes."""
    from huggingface_hub import ModelCard

    header = read_card(facts.source_card)
    base = facts.base_model
    if base is None and _has_our_tag(header) and isinstance(header.get("base_model"), str):
        base = header["base_model"]
    data = _header(facts, header, base)
    parts = [_title(facts, base), _origin(facts, header, base), _sizes(facts), _zeros(facts)]
    parts += [_digests(facts), _trained(facts.commands), _loading(facts.config)]
    body = "\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")).encode()


def _header(facts: CardFacts, header: Mapping[str, Any], base: str | None) -> ModelCardData:
    from huggingface_hub import ModelCardData

    carried = {name: header[name] for name in _CARRIED if header.get(name)}
    made = (("pruned", facts.plan), ("sparse", facts.sparsity))
    return ModelCardData(
        base_model=base,
        library_name="transformers",
        tags=[TAG, *(tag for tag, how in made if how is not None)],
        **{"pipeline_tag": "text-generation", **carried},
    )


def _title(facts: CardFacts, base: str | None) -> str:
    done = [
        word
        for word, is_so in (
            ("pruned", facts.plan is not None),
            ("repaired", facts.is_repaired),
            ("gates folded in", facts.folding is not None),
            ("sparse", facts.sparsity is not None),
            ("trained further", bool(facts.commands)),
        )
        if is_so
    ]
    return f"# {', '.join([base or f'A {facts.config.family} model', *done])}\n"


def _origin(facts: CardFacts, header: Mapping[str, Any], base: str | None) -> str:
    made = f"[{base}](https://huggingface.co/{base})" if base else "a model whose name is not known"
    plan = facts.plan
    lines = [f"Made from {made} with megatron_prune."]
    if plan is not None:
        lines.append(
            f"What it keeps was decided by the criterion `{plan.criterion}` (seed {plan.seed}) and "
            "stands in `plan.json`, in the source's numbering."
        )
    if plan is not None and plan.kept.vocab is not None:
        lines.append(
            f"Its tokenizer has {len(plan.kept.vocab):,} of the source's tokens, with new ids; "
            "`vocab_plan.json` has the old ones and says how they were chosen."
        )
    if facts.is_repaired:
        lines.append(
            "Some tensors were then fitted anew or rescaled: `repair.json` says which, how, and "
            "what it did to their errors."
        )
    if facts.folding is not None:
        axes = ", ".join(facts.folding.gates.words)
        lines.append(
            f"The source was trained with soft gates on {axes}; those of the units that stay were "
            f"folded into its weights. `{FOLDING}` has every gate."
        )
    if "license" not in header:
        lines.append(
            "No licence is given here, because the card of the source, if there was one, gives "
            "none: look it up before you hand this model on."
        )
    return "\n".join(lines) + "\n"


def _sizes(facts: CardFacts) -> str:
    config, plan = facts.config, facts.plan
    after = {"parameters": count_parameters(config), **config.shape.as_dict()}
    rows = ["## Sizes", ""]
    if plan is None:
        rows += ["| | |", "|---|---:|"]
        rows += [f"| {name} | {size:,} |" for name, size in after.items() if isinstance(size, int)]
    else:
        source = replace(config, shape=plan.source)
        before = {"parameters": count_parameters(source), **plan.source.as_dict()}
        rows += ["| | before | after |", "|---|---:|---:|"]
        rows += [f"| {name} | {size:,} | {after[name]:,} |" for name, size in before.items()]
    if widths := config.shape.ffn_per_layer:
        rows += ["", f"FFN channels of each layer: {', '.join(map(str, widths))}."]
    tied = "tied to" if config.tied else "apart from"
    return "\n".join([*rows, "", f"The output layer is {tied} the embeddings.", ""])


def _zeros(facts: CardFacts) -> str:
    """What the zeros are, and what they do not change."""
    record = facts.sparsity
    if record is None:
        return ""
    lines = [
        "## Sparsity",
        "",
        f"{record.reached:.2%} of the weights of {len(record.tensors)} linears in its layers were "
        f"set to zero, by the method {record.words}.",
    ]
    if record.pattern is not None:
        pattern = parse_pattern(record.pattern)
        lines.append(
            f"{pattern}: of every {pattern.group} consecutive inputs of a row at most "
            f"{pattern.keep} have a weight that is not zero."
        )
    lines.append(
        "Zeros are stored like any other weight. So the files are as large as those of the dense "
        "model, and it runs no faster, unless what runs it packs the weights and has kernels for "
        f"that. `{SPARSITY}` says how the zeros were chosen, how many each matrix has, and how "
        "much of its outputs they leave."
    )
    if facts.commands:
        lines.append("Training has kept the zeros only where it ran with `--keep-zeros`.")
    return "\n".join([*lines, ""])


def _digests(facts: CardFacts) -> str:
    rows = []
    if facts.plan is not None:
        rows = [
            f"- the source's tensors, as `plan.json` names them: `{facts.plan.source_digest}`",
            f"- `plan.json`: `{facts.plan_digest}`",
        ]
    if facts.sparsity is not None:
        rows.append(
            f"- the tensors that were made sparse, as `{SPARSITY}` names them: "
            f"`{facts.sparsity.source_digest}`"
        )
    if not rows:
        return ""
    rows.append("- every file of weights: in `manifest.json`")
    return "\n".join(["## Digests (SHA-256)", "", *rows, ""])


def _trained(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = ["## Training", ""]
    for row in map(json.loads, commands):
        lines.append(
            f"From iteration {row['iteration']} on, {row['processes']} processes, megatron_prune "
            f"{row['version']}:"
        )
        words = shlex.join(["megatron-prune", *map(str, row["argv"])]).splitlines()
        lines += ["", *(f"    {line}" for line in words), ""]
    return "\n".join(lines)


def _loading(config: ModelConfig) -> str:
    more = "" if config.shape.ffn_per_layer is None else ", trust_remote_code=True"
    return f"""## Loading

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

where = "."  # this directory, or its name on the hub
model = AutoModelForCausalLM.from_pretrained(where, dtype="auto"{more})
tokenizer = AutoTokenizer.from_pretrained(where)
```
"""
