"""What a plan keeps and what its shapes cost; and the files that a report was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from megatron_prune.families.llama import LLAMA
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.costs import weight_bytes
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.report.decisions import dropped_layers, kept_mask
from megatron_prune.report.inputs import Inputs
from megatron_prune.report.page import Section, Sheet, Table, in_words, slug
from megatron_prune.report.pictures import Picture
from megatron_prune.report.unit_pictures import plan_map


def plan_section(inputs: Inputs, config: ModelConfig | None) -> Section | None:
    """A map of each plan, how it was made, and the shapes with their parameters and bytes.

    Args:
        config: of the source model; None leaves open whether its output layer is tied, and counts
            16-bit weights without biases.

    Returns:
        None when nothing tells the shape of the source.
    """
    shapes = _shapes(inputs, config)
    if not shapes:
        return None
    sizes = _sizes_table(shapes, config)
    parts: list[Table | Picture] = [_map(label, plan) for label, plan in inputs.plans.items()]
    if inputs.plans:
        parts.append(_plans_table(inputs.plans))
    return Section(
        anchor="plan",
        title="What the plan keeps" if inputs.plans else "The model",
        parts=[*parts, sizes],
        sheets=[Sheet(name="shapes", header=sizes.header, rows=partial(iter, sizes.rows))],
    )


def _map(label: str, plan: PrunePlan) -> Picture:
    masks = {axis: kept_mask(plan, axis) for axis in "QFD"}
    grey = "; grey rows are dropped layers" if dropped_layers(plan) else ""
    return Picture(
        name=slug("map", label),
        caption=f"{label}: share kept of hidden channels, and in each layer of heads and FFN "
        f"channels{grey}",
        draw=partial(plan_map, kept=masks, dropped=dropped_layers(plan)),
    )


def files_section(inputs: Inputs) -> Section:
    """The files that the page was made from, their digests, and how the scores were made."""
    files = [(file.label, file.kind, file.sha256) for file in inputs.files]
    caption = "Files this page was made from"
    tables = [Table(header=("file", "kind", "SHA-256"), rows=files, caption=caption)]
    if facts := _facts(inputs):
        tables.append(Table(header=("fact", "value"), rows=facts, caption="What was scored, how"))
    return Section(anchor="files", title="Files and digests", parts=tables)


def _facts(inputs: Inputs) -> list[tuple[str, str]]:
    facts = []
    if inputs.source_digest is not None:
        facts.append(("source model's digest", inputs.source_digest))
    facts += [(f"digest of {label}", plan.digest) for label, plan in inputs.plans.items()]
    if inputs.scores is not None:
        held = {n: "".join(sorted(axes)) for n, axes in sorted(inputs.scores.criteria.items())}
        facts.append(("criteria (axes)", ", ".join(f"{n} ({axes})" for n, axes in held.items())))
        facts += [(k, in_words(v)) for k, v in sorted(inputs.scores.provenance.items())]
    return facts


def _plans_table(plans: Mapping[str, PrunePlan]) -> Table:
    def dropped(plan: PrunePlan) -> str:
        return ", ".join(map(str, dropped_layers(plan))) or "none"

    of = list(plans.values())
    rows = [
        ("criterion", *(plan.criterion for plan in of)),
        ("seed", *(str(plan.seed) for plan in of)),
        ("selection", *(f"{plan.prune_type}, TP={plan.balance_for}" for plan in of)),
        ("dropped layers", *map(dropped, of)),
    ]
    return Table(header=("plan", *plans), rows=rows, caption="Plans")


def _shapes(inputs: Inputs, config: ModelConfig | None) -> dict[str, ModelShape]:
    """Column heading -> shape, the source's first; empty when nothing tells the source's."""
    source = inputs.source or (None if config is None else config.shape)
    if source is None:
        return {}
    return {"source": source, **{label: plan.target for label, plan in inputs.plans.items()}}


def _sizes_table(shapes: Mapping[str, ModelShape], config: ModelConfig | None) -> Table:
    names = shapes["source"].as_dict()
    rows = [(name, *(f"{s.as_dict()[name]:,}" for s in shapes.values())) for name in names]
    if any(s.ffn_per_layer is not None for s in shapes.values()):
        widths = (f"{min(s.ffn_widths):,} to {max(s.ffn_widths):,}" for s in shapes.values())
        rows.append(("FFN channels of a layer", *widths))
    for what, base in _configs(shapes["source"], config).items():
        configs = [replace(base, shape=shape) for shape in shapes.values()]
        counts = [count_parameters(x) for x in configs]
        rows.append((f"parameters{what}", *(f"{n:,}" for n in counts)))
        rows.append((f"bytes in {base.dtype}{what}", *(f"{weight_bytes(x):,}" for x in configs)))
        rows.append((f"share of the source{what}", *(f"{n / counts[0]:.1%}" for n in counts)))
    hint = " (--load SRC makes parameters and bytes exact)" if config is None else ""
    caption = f"Shapes and what they cost{hint}"
    return Table(header=("size", *shapes), rows=rows, caption=caption)


def _configs(shape: ModelShape, config: ModelConfig | None) -> dict[str, ModelConfig]:
    """What to add to a row's name -> the model it counts: one that is known, or two guesses."""
    if config is not None:
        return {"": config}
    own = ModelConfig(family=LLAMA, shape=shape, tied=False, dtype="bf16", hf_config={})
    return {", output tied": replace(own, tied=True), ", output of its own": own}
