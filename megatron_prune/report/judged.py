"""Models before and after, as ``evaluate`` judged them: texts and benchmark tasks in tables."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from megatron_prune.report.page import Rows, Sheet, Table

NOTHING = "-"
_COLUMNS = {
    "parameters": ",.0f",
    "loss": ".4f",
    "perplexity": ",.4g",
    "bits_per_byte": ".4f",
    "tokens": ",.0f",
}
_ZEROS = {"sparsity": ".2%"}  # a column where any model says it


def is_judgement(values: Mapping[str, Any]) -> bool:
    """Whether a JSON table is what ``evaluate --json`` writes."""
    return {"loss", "perplexity", "bits_per_byte", "load"} <= values.keys()


def is_task_results(values: Mapping[str, Any]) -> bool:
    """Whether a JSON table is what ``evaluate --tasks --save`` writes."""
    return isinstance(values.get("results"), dict) and "load" in values


def judged_tables(
    judgements: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]]
) -> tuple[list[Table], list[Sheet]]:
    """Tables of texts and of tasks, in the order given, and the sheets of their numbers.

    Shares and differences of a text's table are against its first model.
    """
    tables, sheets = [], []
    if judgements:
        tables.append(_text_table(judgements))
        names = ("model", *_columns(judgements), "data", "load")
        sheets.append(Sheet(name="judged", header=names, rows=partial(_text_rows, judgements)))
    if results:
        tables.append(_task_table(results))
        names = ("model", "task, metric", "score", "standard error")
        sheets.append(Sheet(name="tasks", header=names, rows=partial(_task_rows, results)))
    return tables, sheets


def _columns(judgements: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Names of the numbers that are shown, and their formats."""
    has_zeros = any("sparsity" in values for values in judgements.values())
    return _COLUMNS | (_ZEROS if has_zeros else {})


def _text_rows(judgements: Mapping[str, Mapping[str, Any]]) -> Rows:
    for label, values in judgements.items():
        named = (*_columns(judgements), "data", "load")
        yield (label, *(values.get(name, "") for name in named))


def _task_rows(results: Mapping[str, Mapping[str, Any]]) -> Rows:
    for label, values in results.items():
        for name, (score, error) in task_scores(values).items():
            yield (label, name, score, "" if error is None else error)


def _number(value: Any, form: str) -> str:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return format(value, form) if known else NOTHING


def _known(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _text_table(judgements: Mapping[str, Mapping[str, Any]]) -> Table:
    counts = [_known(values.get("parameters")) for values in judgements.values()]
    base, columns = next(iter(judgements.values())).get("loss"), _columns(judgements)
    rows: list[tuple[str, ...]] = []
    for (label, values), count in zip(judgements.items(), counts):
        loss, rise = values.get("loss"), NOTHING
        if rows and isinstance(loss, int | float) and isinstance(base, int | float):
            rise = f"{loss - base:+.4f}"
        share = _number(count / counts[0] if count and counts[0] else None, ".1%")
        cells = [_number(values.get(name), form) for name, form in columns.items()]
        rows.append((label, cells[0], share, cells[1], rise, *cells[2:], str(values.get("load"))))
    header = (
        "model", "parameters", "of the first", "loss", "above the first", "perplexity",
        "bits per byte", "on tokens", *(("zeros",) if "sparsity" in columns else ()), "checkpoint",
    )  # fmt: skip
    texts = dict.fromkeys(str(values.get("data")) for values in judgements.values())
    return Table(header=header, rows=rows, caption=f"Held-out text: {', '.join(texts)}")


def task_scores(results: Mapping[str, Any]) -> dict[str, tuple[float, float | None]]:
    """``task, metric`` -> (score, its standard error) of lm-evaluation-harness' results."""
    found = {}
    for task, values in results["results"].items():
        for key, value in values.items() if isinstance(values, dict) else ():
            name, _, filtered = key.partition(",")
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not filtered or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr,{filtered}")
            label = f"{task}, {name}" + ("" if filtered == "none" else f" ({filtered})")
            found[label] = (float(value), error if isinstance(error, float) else None)
    return found


def _task_table(results: Mapping[str, Mapping[str, Any]]) -> Table:
    scores = {label: task_scores(values) for label, values in results.items()}
    names = dict.fromkeys(name for of in scores.values() for name in of)

    def cell(of: Mapping[str, tuple[float, float | None]], name: str) -> str:
        if name not in of:
            return NOTHING
        score, error = of[name]
        return f"{score:.4f}" + ("" if error is None else f" ± {error:.4f}")

    rows = [(name, *(cell(of, name) for of in scores.values())) for name in names]
    caption = "lm-evaluation-harness: score ± standard error"
    return Table(header=("task, metric", *results), rows=rows, caption=caption)
