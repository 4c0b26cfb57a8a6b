"""What a report shows of runs of `shear`: how masks came to their target, and what they became.

The shares of all runs stand in one picture against their targets; multipliers, layers and gates
follow run by run. What the plan keeps is the section after this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Scores
from megatron_prune.report.decisions import dropped_layers, kept_mask
from megatron_prune.report.inputs import Inputs
from megatron_prune.report.mask_pictures import gate_maps, share_maps, target_picture
from megatron_prune.report.masks import HELD, UNITS, held_words, points_of, shares_gone
from megatron_prune.report.page import Rows, Section, Sheet, Table, slug
from megatron_prune.report.pictures import Picture
from megatron_prune.report.run_pictures import panels_picture
from megatron_prune.report.runs import Run
from megatron_prune.shearing.words import BY_LAYER, EXPECTED, GATES, MULTIPLIERS, TARGET

_NOTHING = "-"
_OF = ("of the distance", "of its square", "of what is undecided")  # the multipliers
_LAYERS = AXES["L"].word
_WHEN = (
    "What an iteration says of masks is said of those that it began with. A layer has died at the "
    "first logged iteration from which on more than half of it is expected to be gone."
)


def mask_section(inputs: Inputs) -> Section | None:
    """Shares and targets of all runs with masks, then multipliers, layers and gates of each.

    Returns:
        None when no run has masks.
    """
    runs = {label: run for label, run in inputs.runs.items() if held_words(run)}
    if not runs:
        return None
    parts: list[Picture | Table] = [_targets(runs), _last_table(runs)]
    for label, run in runs.items():
        plan = inputs.learned.get(label)
        parts += [*_multipliers(label, run), *_layers(label, run, plan)]
        if (scores := inputs.gates.get(label)) is not None:
            parts += _gates(label, scores, plan)
    if rows := _deaths(runs, inputs.learned):
        header = ("run", "layer", "died at iteration", "share gone at the last", "in the plan")
        parts.append(Table(header=header, rows=rows, caption="When layers died"))
    sheets = [_course_sheet(runs), _layer_sheet(runs)]
    if inputs.gates:
        sheets.append(_gate_sheet(inputs))
    text = " ".join([_WHEN, *_lacks(inputs, runs)])
    return Section(anchor="masks", title="Learned masks", text=text, parts=parts, sheets=sheets)


def _lacks(inputs: Inputs, runs: Mapping[str, Run]) -> Iterator[str]:
    given = {plan.digest for plan in inputs.plans.values()}
    for label in runs:
        plan = inputs.learned.get(label)
        if plan is None:
            yield f"{label} has no plan beside its metrics: it has not ended."
        elif plan.digest not in given:
            yield f"The plan of {label} is about another model than the rest, and not shown below."


def _targets(runs: Mapping[str, Run]) -> Picture:
    words = [word for word in HELD if any(word in held_words(run) for run in runs.values())]
    panels = {
        HELD[word]: {
            label: (points_of(run, EXPECTED, word), points_of(run, TARGET, word))
            for label, run in runs.items()
            if word in held_words(run)
        }
        for word in words
    }
    return Picture(
        name="mask-targets",
        caption="Share that is expected to go over iterations, and its target (dotted)",
        draw=partial(target_picture, panels=panels),
    )


def _told_multipliers(runs: Mapping[str, Run]) -> list[str]:
    """Those that any of the runs has; none, where masks are of the target's size all the time."""
    held = [(run, word) for run in runs.values() for word in held_words(run)]
    return [
        kind
        for kind in MULTIPLIERS
        if any(run.last(f"{kind} {word}") is not None for run, word in held)
    ]


def _last_table(runs: Mapping[str, Run]) -> Table:
    rows, multipliers = [], _told_multipliers(runs)
    for label, run in runs.items():
        for word in held_words(run):
            iteration, expected = points_of(run, EXPECTED, word)[-1]
            target = run.last(f"{TARGET} {word}")
            off = None if target is None else expected - target
            rows.append(
                (
                    label,
                    HELD[word],
                    f"{iteration:,.0f}",
                    _said(expected, ".4f"),
                    _said(target, ".4f"),
                    _said(off, "+.4f"),
                    *(_said(run.last(f"{kind} {word}"), ".4g") for kind in multipliers),
                )
            )
    header = (
        "run", "of", "iteration", "expected to go", "target", "distance", *multipliers,
    )  # fmt: skip
    return Table(header=header, rows=rows, caption="At the last logged iteration")


def _said(value: float | None, form: str) -> str:
    return _NOTHING if value is None else format(value, form)


def _multipliers(label: str, run: Run) -> Iterator[Picture]:
    panels = {
        f"{kind}, {of}": {HELD[word]: points_of(run, kind, word) for word in held_words(run)}
        for kind, of in zip(MULTIPLIERS, _OF)
    }
    panels = {text: lines for text, lines in panels.items() if any(lines.values())}
    if panels:
        yield Picture(
            name=slug("multipliers", label),
            caption=f"{label}: multipliers of the distance from the target over iterations",
            draw=partial(panels_picture, panels=panels, unit="iteration"),
        )


def _layers(label: str, run: Run, plan: PrunePlan | None) -> Iterator[Picture]:
    shares = shares_gone(run)
    if not shares:
        return
    died = enumerate(shares[_LAYERS].died()) if _LAYERS in shares else ()
    crossed = {layer: at for layer, at in died if at is not None}
    marks = ["; crosses: when layers died"] if crossed else []
    dropped = () if plan is None else dropped_layers(plan)
    marks += ["; layers with a cross at their number are not in the plan"] if dropped else []
    yield Picture(
        name=slug("mask-layers", label),
        caption=f"{label}: share expected to be gone of each layer over iterations{''.join(marks)}",
        draw=partial(
            share_maps,
            shares={UNITS[word]: x for word, x in shares.items()},
            crossed={UNITS[_LAYERS]: crossed},
            dropped=dropped,
        ),
    )


def _deaths(runs: Mapping[str, Run], plans: Mapping[str, PrunePlan]) -> list[tuple[str, ...]]:
    """Layers that died, in that order, and those that only the plan drops."""
    rows: list[tuple[str, ...]] = []
    for label, run in runs.items():
        of, plan = shares_gone(run).get(_LAYERS), plans.get(label)
        if of is None:
            continue
        dropped = () if plan is None else dropped_layers(plan)
        known = zip(of.died(), range(len(of.rows[0])), of.rows[-1])
        shown = [x for x in known if x[0] is not None or x[1] in dropped]
        for at, layer, share in sorted(shown, key=lambda x: math.inf if x[0] is None else x[0]):
            stays = "dropped" if layer in dropped else "kept"
            when = _said(at, ",.0f")
            said = _NOTHING if plan is None else stays
            rows.append((label, str(layer), when, f"{share:.4f}", said))
    return rows


def _shown_gates(scores: Scores) -> dict[str, Tensor]:
    """By axis; not those of heads that only repeat their group's."""
    gates = dict(scores.criteria.get(GATES, {}))
    if "Q" in gates and "K" in gates:
        of_group = gates["K"].repeat_interleave(scores.shape.heads_per_group, 1)
        if torch.equal(gates["Q"], of_group):
            del gates["Q"]
    return gates


def _gates(label: str, scores: Scores, plan: PrunePlan | None) -> Iterator[Picture]:
    gates = _shown_gates(scores)
    if not gates:
        return
    kept = {} if plan is None else {letter: kept_mask(plan, letter) for letter in gates}
    dropped = () if plan is None else dropped_layers(plan)
    said = ["gates without noise after the last iteration, 0 is shut"]
    if kept:
        said.append(
            "orange: what the plan keeps (outlined where there is room), or how many (line)"
        )
    said += ["grey rows are dropped layers"] if dropped else []
    yield Picture(
        name=slug("gates", label),
        caption=f"{label}: {'; '.join(said)}",
        draw=partial(gate_maps, gates=gates, kept=kept, dropped=dropped),
    )


def _course_sheet(runs: Mapping[str, Run]) -> Sheet:
    kinds = (EXPECTED, TARGET, *_told_multipliers(runs))

    def rows() -> Rows:
        for label, run in runs.items():
            for word in held_words(run):
                by_kind = [dict(points_of(run, kind, word)) for kind in kinds]
                for iteration in by_kind[0]:
                    values = (values.get(iteration, "") for values in by_kind)
                    yield (label, f"{iteration:.0f}", word, *values)

    return Sheet(name="masks", header=("run", "iteration", "axis", *kinds), rows=rows)


def _layer_sheet(runs: Mapping[str, Run]) -> Sheet:
    def rows() -> Rows:
        for label, run in runs.items():
            for word, of in shares_gone(run).items():
                for iteration, shares in zip(of.iterations, of.rows):
                    for layer, share in enumerate(shares):
                        yield (label, f"{iteration:.0f}", word, layer, share)

    return Sheet(
        name="mask-layers", header=("run", "iteration", "axis", "layer", BY_LAYER), rows=rows
    )


def _gate_sheet(inputs: Inputs) -> Sheet:
    """A row a gate; no layer of hidden channels and layers, no word on the plan where none is."""

    def rows() -> Rows:
        for label, scores in inputs.gates.items():
            plan = inputs.learned.get(label)
            for letter, gates in _shown_gates(scores).items():
                kept = None if plan is None else kept_mask(plan, letter)
                for at in torch.cartesian_prod(*map(torch.arange, gates.shape)).tolist():
                    place = tuple(at) if isinstance(at, list) else (at,)
                    where = place if len(place) == 2 else ("", *place)
                    stays = "" if kept is None else f"{int(kept[place])}"
                    yield (label, AXES[letter].word, *where, f"{float(gates[place]):.9g}", stays)

    return Sheet(name="gates", header=("run", "axis", "layer", "unit", "gate", "kept"), rows=rows)
