"""What a report shows, section by section: what came of it, then why, then how to make it again.

The result and the losses come first, then learned masks, the plan, the scores behind it and what a
search tried, then the zeros of sparse models and the course of the runs; digests and commands are
the end. Every section stands when one of the inputs has something for it: scores without a plan are
maps with nothing outlined, a plan without scores is maps of what it keeps. Of several criteria the
plan's own comes first and open, the others fold away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_prune.model.lazy import Tensor
from megatron_prune.model.shape import LAYER_AXES, ModelConfig, ModelShape
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Scores
from megatron_prune.report.charts import overlap_matrix
from megatron_prune.report.decisions import (
    AXIS_NAMES,
    UNITS,
    axis_scores,
    chance,
    criteria_of,
    dropped_layers,
    is_pruned,
    kept_mask,
    overlap,
    overlap_masks,
)
from megatron_prune.report.inputs import Inputs
from megatron_prune.report.mask_sections import mask_section
from megatron_prune.report.overview import files_section, plan_section
from megatron_prune.report.page import Rows, Section, Sheet, slug
from megatron_prune.report.pictures import Picture
from megatron_prune.report.result import result_section
from megatron_prune.report.run_sections import (
    command_section,
    course_section,
    domain_section,
    loss_section,
)
from megatron_prune.report.sparsity import sparsity_section
from megatron_prune.report.tried import search_section
from megatron_prune.report.unit_pictures import (
    NARROW,
    kept_strip,
    layer_bars,
    sorted_scores,
    unit_map,
    wide_map,
)

_READING = {
    "Q": "Heads compete inside their query group; thick lines part the groups.",
    "K": "A group without a score of its own has that of its heads together.",
    "F": "Channels compete inside their layer, and inside each rank's part in a balanced plan.",
    "D": "Hidden channels are chosen once for the whole model.",
    "L": "The higher a bar, the more the layer is worth.",
}


@dataclass(frozen=True, kw_only=True)
class _View:
    """One way to look at an axis: the decision of a plan, or none.

    Attributes:
        criterion: the plan's, as an expression; empty without a plan.
        kept: None where the plan leaves the axis whole.
    """

    label: str = ""
    criterion: str = ""
    kept: Tensor | None = None
    dropped: tuple[int, ...] = ()


def report_sections(inputs: Inputs, config: ModelConfig | None) -> list[Section]:
    """All sections of a page, in order.

    Args:
        config: of the source model, for exact parameters and bytes; None guesses.
    """
    runs = inputs.runs
    sections = [
        result_section(inputs, config),
        loss_section(runs),
        mask_section(inputs),
        plan_section(inputs, config),
        *(_axis_section(inputs, axis) for axis in AXIS_NAMES),
        _overlap_section(inputs),
        search_section(inputs),
        sparsity_section(inputs),
        course_section(runs),
        domain_section(runs),
        files_section(inputs),
        command_section(runs),
    ]
    return [section for section in sections if section is not None]


def _views(inputs: Inputs, axis: str) -> list[_View]:
    """A view for each plan that changes something to be seen along the axis; one without a name
    when none does. Without scores, what learned masks keep is seen among their gates."""
    views: list[_View] = []
    for label, plan in inputs.plans.items():
        if label in inputs.gates and inputs.scores is None:
            continue
        kept = kept_mask(plan, axis) if is_pruned(plan, axis) else None
        dropped = dropped_layers(plan) if axis in LAYER_AXES else ()
        if kept is not None or dropped:
            criterion = plan.criterion
            views.append(_View(label=label, criterion=criterion, kept=kept, dropped=dropped))
    return views or [_View()]


def _axis_section(inputs: Inputs, axis: str) -> Section | None:
    """The pictures of one axis, a view after the other; None when there is nothing to see."""
    source = inputs.source
    if source is None or (axis == "K" and source.heads_per_group == 1):
        return None  # one head a group: the heads' pictures show the groups
    pictures: list[Picture] = []
    for view in _views(inputs, axis):
        if axis == "L":
            pictures += _layer_pictures(view, inputs.scores)
        else:
            pictures += _unit_pictures(axis, view, inputs.scores, source)
    if not pictures:
        return None
    title = AXIS_NAMES[axis][:1].upper() + AXIS_NAMES[axis][1:]
    return Section(
        anchor=slug(AXIS_NAMES[axis]),
        title=title,
        text=f"{_counts(inputs.plans, axis)}{_READING[axis]}",
        parts=pictures,
        sheets=[_unit_sheet(inputs, axis)],
    )


def _counts(plans: Mapping[str, PrunePlan], axis: str) -> str:
    """What each plan keeps of an axis, as sentences."""
    said = ""
    for label, plan in plans.items():
        layers = plan.layers if axis in LAYER_AXES else (None,)
        counts = sorted({len(plan.indices(axis, n)) for n in layers})
        number = " to ".join(f"{n:,}" for n in (counts[0], counts[-1])[: len(counts)])
        where = " in every kept layer" if axis in LAYER_AXES and len(counts) == 1 else ""
        said += f"{label} keeps {number} of {plan.source.size(axis):,} {AXIS_NAMES[axis]}{where}. "
    return said


def _unit_pictures(
    axis: str, view: _View, scores: Scores | None, source: ModelShape
) -> Iterator[Picture]:
    """One picture a criterion; of what is kept alone when nothing scores the axis."""
    criteria = criteria_of(scores, axis, view.criterion)
    by = view.criterion if view.kept is not None else ""
    is_held = scores is not None and axis_scores(scores, by, axis) is not None if by else True
    of: list[tuple[str, Tensor | None]] = [*criteria.items()]
    if not of and view.kept is not None:
        of = [("", None)]
    for number, (name, x) in enumerate(of):
        words = [view.label, f"{name} scores" if name else ""]
        if not is_held and number == 0:
            words.append(f"chosen by {by}, which the scores do not hold for this axis")
        words += _marks(axis, view, x, source)
        yield Picture(
            name=slug(AXIS_NAMES[axis], view.label, name),
            caption="; ".join(word for word in words if word),
            draw=_draw(axis, view, x, source),
            # what a plan leaves whole is there for those who look for it
            is_folded=number > 0 or (view.kept is None and bool(view.criterion)),
        )


def _marks(axis: str, view: _View, scores: Tensor | None, source: ModelShape) -> list[str]:
    """How kept and dropped units look in a picture, for its caption."""
    if view.kept is None:
        how = ""
    elif axis == "D":
        how = "blue is kept, orange dropped" if scores is not None else ""
    elif source.size(axis) > NARROW:
        how = ""  # the colour bars say it
    else:
        how = f"kept {UNITS[axis]}s are {'outlined' if scores is not None else 'filled'}"
    return [how, "grey rows are dropped layers" if view.dropped else ""]


def _draw(axis: str, view: _View, scores: Tensor | None, source: ModelShape) -> Any:
    if axis == "D":
        if scores is None:
            assert view.kept is not None
            return partial(kept_strip, kept=view.kept, unit="hidden channel")
        return partial(sorted_scores, scores=scores, kept=view.kept, unit="hidden channel")
    facts: dict[str, Any] = {
        "scores": scores,
        "kept": view.kept,
        "dropped": view.dropped,
        "unit": UNITS[axis],
    }
    if source.size(axis) > NARROW:
        return partial(wide_map, **facts)
    return partial(unit_map, **facts, per_group=source.heads_per_group if axis == "Q" else 1)


def _layer_pictures(view: _View, scores: Scores | None) -> Iterator[Picture]:
    """Importance of every layer; when nothing scores layers, which ones a plan drops."""
    criteria = criteria_of(scores, "L", view.criterion)
    name = slug("layers", view.label)
    if criteria:
        dropped = () if view.kept is None else tuple((~view.kept).nonzero().flatten().tolist())
        marks = "hatched orange bars are dropped" if dropped else ""
        words = (view.label, "importance of every layer", marks)
        draw = partial(layer_bars, criteria=criteria, dropped=dropped)
        yield Picture(name=name, caption="; ".join(word for word in words if word), draw=draw)
    elif view.kept is not None:
        strip = partial(kept_strip, kept=view.kept, unit="layer")
        yield Picture(name=name, caption=f"{view.label}; which layers are kept", draw=strip)


def _unit_sheet(inputs: Inputs, axis: str) -> Sheet:
    """A row a unit: where it is, whether each plan keeps it, its score by each criterion."""
    criteria = criteria_of(inputs.scores, axis)
    masks = {label: kept_mask(plan, axis) for label, plan in inputs.plans.items()}
    is_per_layer = axis in LAYER_AXES

    def rows() -> Rows:
        columns = [x if is_per_layer else x[None] for x in (*masks.values(), *criteria.values())]
        for layer in range(len(columns[0])):
            values = [x[layer].tolist() for x in columns]
            for unit, row in enumerate(zip(*values)):
                at = (layer, unit) if is_per_layer else (unit,)
                yield [*at, *(f"{x:.9g}" for x in row)]  # float32 and back

    units = ("layer", UNITS[axis]) if is_per_layer else (UNITS[axis],)
    header = (*units, *(f"kept by {label}" for label in masks), *criteria)
    return Sheet(name=slug(AXIS_NAMES[axis]), header=header, rows=rows)


def _overlap_section(inputs: Inputs) -> Section | None:
    """A matrix for each plan and axis it prunes, where the scores rank that axis."""
    pictures: list[Picture] = []
    rows: list[tuple[object, ...]] = []
    for label, plan in inputs.plans.items():
        for axis in AXIS_NAMES:
            criteria = criteria_of(inputs.scores, axis, plan.criterion)
            if not criteria or not is_pruned(plan, axis):
                continue
            by_chance = chance(plan, axis)
            if by_chance > 1 - 1e-9:  # the plan keeps all heads of its kept groups
                continue
            masks = overlap_masks(plan, axis, criteria)
            shares = overlap(masks)
            names = list(masks)
            rows += [
                (label, AXIS_NAMES[axis], a, b, f"{float(shares[y, x]):.6f}")
                for y, a in enumerate(names)
                for x, b in enumerate(names)
            ]
            pictures.append(
                Picture(
                    name=slug("overlap", AXIS_NAMES[axis], label),
                    caption=f"{label}, {AXIS_NAMES[axis]}: two random plans of these counts "
                    f"share {by_chance:.0%}",
                    draw=partial(overlap_matrix, names=names, shares=shares, chance=by_chance),
                )
            )
    if not pictures:
        return None
    header = ("plan", "axis", "keeps", "also kept by", "share")
    return Section(
        anchor="overlap",
        title="Overlap between criteria",
        text="Share of kept units that two criteria have in common when each keeps as many as the "
        "plan does, in its kept layers and groups. Where two disagree, a measurement tells most.",
        parts=pictures,
        sheets=[Sheet(name="overlap", header=header, rows=partial(iter, rows))],
    )
