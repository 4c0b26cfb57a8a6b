"""The first section of a report: what was cut, what it cost, and what came back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.model.axes import count_parameters
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.report.inputs import Inputs
from megatron_prune.report.judged import judged_tables
from megatron_prune.report.page import Section

_SIZES = {
    "num_layers": "layers",
    "hidden_size": "hidden channels",
    "num_attention_heads": "attention heads",
    "num_query_groups": "query groups",
    "vocab_size": "tokens",
}


def result_section(inputs: Inputs, config: ModelConfig | None) -> Section | None:
    """The numbers in a few sentences, then the tables of `evaluate`.

    Args:
        config: of the source model, which tells parameters; None leaves them out.

    Returns:
        None when there is neither a plan nor a judged model.
    """
    judgements = {label: x.values for label, x in inputs.judgements.items()}
    results = {label: x.values for label, x in inputs.results.items()}
    said = [_cut(label, plan, config) for label, plan in inputs.plans.items()]
    said += _course_of_loss(judgements)
    tables, sheets = judged_tables(judgements, results)
    if not said and not tables:
        return None
    return Section(
        anchor="result", title="Result", text=" ".join(said), parts=tables, sheets=sheets
    )


def _cut(label: str, plan: PrunePlan, config: ModelConfig | None) -> str:
    """What one plan keeps, as one sentence."""
    source, target = plan.source, plan.target
    before, after = source.as_dict(), target.as_dict()
    sizes = [
        f"{after[name]:,} of {before[name]:,} {words}"
        for name, words in _SIZES.items()
        if after[name] != before[name]
    ]
    widths = sorted({*target.ffn_widths})
    if widths != [source.ffn_hidden_size]:
        count = " to ".join(f"{n:,}" for n in dict.fromkeys((widths[0], widths[-1])))
        sizes.append(f"{count} of {source.ffn_hidden_size:,} FFN channels in a layer")
    said = f"{label} keeps {', '.join(sizes) or 'all of the model'}"
    if config is None:
        return f"{said}."
    dense, kept = (count_parameters(replace(config, shape=shape)) for shape in (source, target))
    return f"{said}: {kept:,} of {dense:,} parameters ({kept / dense:.1%})."


def _course_of_loss(judgements: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The losses in the order given, and how much of the first rise the third one takes back."""
    if len({str(values.get("data")) for values in judgements.values()}) > 1:
        texts = sorted({str(values.get("data")) for values in judgements.values()})
        yield f"The models were judged on different texts, not to be compared: {', '.join(texts)}."
        return
    losses = {label: values["loss"] for label, values in judgements.items()}
    if len(losses) < 2 or not all(isinstance(loss, int | float) for loss in losses.values()):
        return
    (first, base), *others = losses.items()
    rises = [f"{label} {loss:.3f} ({loss - base:+.3f})" for label, loss in others]
    yield f"The loss on held-out text, in nats a token: {first} {base:.3f}, {', '.join(rises)}."
    if len(others) > 1:
        (cut, high), (back, low) = others[:2]
        if base < low < high:
            share = (high - low) / (high - base)
            yield f"Of what {cut} lost, {back} has won back {share:.0%}."
