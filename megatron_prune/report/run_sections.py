"""What a report shows of training runs and judged models.

Losses of all runs stand in one plot over tokens (over iterations, where a run does not say its
tokens), the course of training below it, domains run by run, models before and after, and the
commands and digests to make it again. What a run's files do not hold is named, not guessed.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_prune.report.page import Rows, Section, Sheet, Table, slug
from megatron_prune.report.pictures import Picture
from megatron_prune.report.run_pictures import loss_picture, panels_picture
from megatron_prune.report.runs import COURSE, DOMAINS, LOSS, TOKENS, VALIDATION, Run

NOTHING = "-"


def _axis(runs: Mapping[str, Run]) -> tuple[bool, str]:
    """Whether all runs know their tokens, and what the horizontal axis says."""
    over_tokens = all(run.has_tokens for run in runs.values())
    return over_tokens, "tokens" if over_tokens else "iteration"


def _said(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def loss_section(runs: Mapping[str, Run]) -> Section | None:
    """The losses of all runs in one picture, and a table of them; None without a run."""
    if not runs:
        return None
    over_tokens, unit = _axis(runs)
    rows = [
        (
            label,
            f"{run.rows[-1]['iteration']:,}",
            _said(run.last(TOKENS), ",.0f"),
            _said(run.last(LOSS), ".4f"),
            _said(run.last(VALIDATION), ".4f"),
            _said(run.middle("tokens-per-second"), ",.0f"),
            ", ".join(run.missing) or "nothing",
        )
        for label, run in runs.items()
    ]
    header = (
        "run", "iterations", "tokens", "last loss", "last validation loss", "median tokens/s",
        "not in its metrics",
    )  # fmt: skip
    picture = Picture(
        name="loss",
        caption=f"Loss over {unit}: what was logged (thin) and its running mean (thick)",
        draw=partial(
            loss_picture,
            training={n: run.points(LOSS, over_tokens=over_tokens) for n, run in runs.items()},
            validation={
                n: run.points(VALIDATION, over_tokens=over_tokens) for n, run in runs.items()
            },
            unit=unit,
        ),
    )
    keys = ("iteration", TOKENS, LOSS, VALIDATION, *COURSE)
    text = "" if over_tokens else "Over iterations: not every run says how many tokens it has seen."
    return Section(
        anchor="training-loss",
        title="Training",
        text=text,
        parts=[picture, Table(header=header, rows=rows, caption="Runs")],
        sheets=[Sheet(name="training", header=("run", *keys), rows=partial(_cells, runs, keys))],
    )


def _cells(runs: Mapping[str, Run], keys: Sequence[str]) -> Rows:
    for label, run in runs.items():
        for row in run.rows:
            yield (label, *(row.get(key, "") for key in keys))


def course_section(runs: Mapping[str, Run]) -> Section | None:
    """Learning rate, gradient norm and speed; None when no run logged them."""
    if not runs:
        return None
    over_tokens, unit = _axis(runs)
    panels = {
        text: {label: run.points(key, over_tokens=over_tokens) for label, run in runs.items()}
        for key, text in COURSE.items()
    }
    panels = {text: lines for text, lines in panels.items() if any(lines.values())}
    if not panels:
        return None
    picture = Picture(
        name="course",
        caption=f"{', '.join(panels).capitalize()} over {unit}",
        draw=partial(panels_picture, panels=panels, unit=unit),
    )
    return Section(anchor="course", title="Course of training", parts=[picture])


def domain_section(runs: Mapping[str, Run]) -> Section | None:
    """A picture for each run that logged domains; None when none did."""
    if not runs:
        return None
    over_tokens, unit = _axis(runs)
    pictures, lacks = [], []
    for label, run in runs.items():
        panels = {
            text: {
                name: run.points(f"{kind}/{name}", over_tokens=over_tokens)
                for name in run.domains(kind)
            }
            for kind, text in DOMAINS.items()
            if run.domains(kind)
        }
        absent = [text for kind, text in DOMAINS.items() if not run.domains(kind)]
        if absent:
            lacks.append(f"{label}'s metrics have no {', no '.join(absent)}.")
        if panels:
            pictures.append(
                Picture(
                    name=slug("domains", label),
                    caption=f"{label}: domains over {unit}",
                    draw=partial(panels_picture, panels=panels, unit=unit),
                )
            )
    if not pictures:
        return None
    header = ("run", "iteration", TOKENS, "domain", *(kind.split()[1] for kind in DOMAINS))
    sheet = Sheet(name="domains", header=header, rows=partial(_domain_cells, runs))
    return Section(
        anchor="domains", title="Domains", text=" ".join(lacks), parts=pictures, sheets=[sheet]
    )


def _domain_cells(runs: Mapping[str, Run]) -> Iterator[Sequence[object]]:
    for label, run in runs.items():
        names = dict.fromkeys(name for kind in DOMAINS for name in run.domains(kind))
        for row in run.rows:
            for name in names:
                values = [row.get(f"{kind}/{name}", "") for kind in DOMAINS]
                if values != [""] * len(values):
                    yield (label, row["iteration"], row.get(TOKENS, ""), name, *values)


def command_section(runs: Mapping[str, Run]) -> Section | None:
    """Commands and digests, and of which runs no commands are known; None without a run."""
    if not runs:
        return None
    commands = [
        (label, f"{int(row.get('iteration', 0)):,}", _command(row))
        for label, run in runs.items()
        for row in run.commands
    ]
    facts = ("checkpoint", "writer", "parameters", "dtype")
    names = [*facts, "plan_digest", "repair_digest", "folding_digest", "manifest.json"]
    rows = [
        (
            name.replace("_", " ") + (" SHA-256" if name == "manifest.json" else ""),
            *(_fact(run.facts.get(name)) for run in runs.values()),
        )
        for name in names
    ]
    parts = [Table(header=("run's newest checkpoint", *runs), rows=rows, caption="Digests")]
    if commands:
        header = ("run", "from iteration", "command")
        parts.insert(0, Table(header=header, rows=commands, caption="What was started"))
    silent = [label for label, run in runs.items() if not run.commands]
    text = f"No commands are recorded for {', '.join(silent)}." if silent else ""
    return Section(anchor="again", title="To make it again", text=text, parts=parts)


def _command(row: Mapping[str, Any]) -> str:
    words = shlex.join(map(str, row["argv"]))
    ranks = row.get("processes", 1)
    start = "megatron-prune" if ranks == 1 else f"torchrun ({ranks} processes) -m megatron_prune"
    return f"{start} {words}"


def _fact(value: Any) -> str:
    if value is None:
        return NOTHING
    return f"{value:,}" if isinstance(value, int) else str(value)
