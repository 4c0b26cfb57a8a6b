"""The section of a report that shows what a budget search tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

from megatron_prune.planning.plan import PrunePlan
from megatron_prune.report.charts import pareto
from megatron_prune.report.inputs import SIZES, Candidate, Inputs, Search
from megatron_prune.report.page import Section, Sheet, Table, in_words, slug
from megatron_prune.report.pictures import Picture

_SHOWN = 20  # candidates in the page's table; the CSV has all
_HEADER = (*SIZES, "parameters", "proxy", "loss")
_UNITS = {  # of the costs that `plan` knows: one of what is shown, and how it is called
    "parameters": (1e6, "parameters (millions)"),
    "bytes": (2**30, "memory (GiB)"),
    "seconds": (1e-3, "latency (ms)"),
    "flops_per_token": (1e6, "MFLOP a token"),
}


def search_section(inputs: Inputs) -> Section | None:
    """Facts, Pareto picture and table of every search; None when there is none."""
    if not inputs.searches:
        return None
    parts: list[Table | Picture] = []
    sheets = []
    for label, search in inputs.searches.items():
        facts = [(key, in_words(value)) for key, value in search.facts.items()]
        if facts:
            parts.append(Table(header=("fact", "value"), rows=facts, caption=f"{label}: search"))
        if search.candidates:
            parts.append(_picture(label, search, inputs.plans))
        parts.append(_table(label, search))
        rows = [_csv_row(candidate) for candidate in search.candidates]
        name = slug("candidates", label)
        sheets.append(Sheet(name=name, header=_HEADER, rows=partial(iter, rows)))
    return Section(
        anchor="search",
        title="What the budget search tried",
        text="Lower is better everywhere. The proxy is what the scores say a shape loses; the "
        "loss, where there is one, was measured. Nothing that was tried lies below and left of "
        "the line.",
        parts=parts,
        sheets=sheets,
    )


def _costs(search: Search) -> tuple[list[float], str, float | None]:
    """What lies on the horizontal axis: the cost the search went by, else parameters.

    Returns:
        One cost a candidate, its label, and the budget's limit where the file has it.
    """
    name = str(search.facts.get("front_cost", "parameters"))
    if not all(name in candidate.costs for candidate in search.candidates):
        name = "parameters"
        costs = [float(candidate.parameters) for candidate in search.candidates]
    else:
        costs = [candidate.costs[name] for candidate in search.candidates]
    scale, label = _UNITS.get(name, (1.0, name))
    budgets = search.facts.get("budgets")
    budget = budgets.get(name) if isinstance(budgets, dict) else None
    limit = budget.get("limit") if isinstance(budget, dict) else None
    if not isinstance(limit, int | float):
        limit = None
    return [cost / scale for cost in costs], label, None if limit is None else limit / scale


def _picture(label: str, search: Search, plans: Mapping[str, PrunePlan]) -> Picture:
    sizes = [candidate.sizes for candidate in search.candidates]
    shapes = {f"shape of {name}": plan.target.as_dict() for name, plan in plans.items()}
    source = search.facts.get("source")
    if isinstance(source, dict):
        shapes["source"] = source
    wanted = {name: tuple(shape.get(size) for size in SIZES) for name, shape in shapes.items()}
    values: dict[str, Sequence[float | None]] = {"proxy": [c.proxy for c in search.candidates]}
    losses = [candidate.loss for candidate in search.candidates]
    measured = sum(loss is not None for loss in losses)
    if measured:
        values["loss (nats per token)"] = losses
    costs, cost_label, limit = _costs(search)
    return Picture(
        name=slug("search", label),
        caption=f"{label}: {len(sizes):,} shapes, {measured:,} of them measured",
        draw=partial(
            pareto,
            costs=costs,
            cost_label=cost_label,
            limit=limit,
            values=values,
            marked={n: sizes.index(w) for n, w in wanted.items() if w in sizes},
        ),
    )


def _table(label: str, search: Search) -> Table:
    # stable: what was not measured stays in the file's order, in which `plan` has the ranked first
    best = sorted(search.candidates, key=lambda c: math.inf if c.loss is None else c.loss)
    count = len(best)
    shown = f"{_SHOWN} of {count:,}" if count > _SHOWN else f"all {count:,}"
    rows = [_page_row(candidate) for candidate in best[:_SHOWN]]
    return Table(header=_HEADER, rows=rows, caption=f"{label}: {shown}, the least loss first")


def _page_row(candidate: Candidate) -> list[str]:
    whole = [f"{n:,}" for n in (*candidate.sizes, candidate.parameters)]
    loss = "" if candidate.loss is None else f"{candidate.loss:.4f}"
    return [*whole, f"{candidate.proxy:.4f}", loss]


def _csv_row(candidate: Candidate) -> list[object]:
    loss = "" if candidate.loss is None else candidate.loss
    return [*candidate.sizes, candidate.parameters, candidate.proxy, loss]
