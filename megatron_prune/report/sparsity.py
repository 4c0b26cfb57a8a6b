"""The section of a report that shows zeros: where they are, what they cost, what stays the same.

From the records that sparse models carry and from what ``evaluate`` made of such models. No weight
is read: of a model that was trained since, the record says what it was made with, and ``evaluate``
what it has now.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_prune.model.axes import split_layer
from megatron_prune.report.inputs import Inputs
from megatron_prune.report.page import Rows, Section, Sheet, Table, in_words, slug
from megatron_prune.report.pictures import Picture
from megatron_prune.report.sparsity_pictures import Panel, Point, cost_picture, matrix_maps
from megatron_prune.sources.sparsity_record import SparseMatrix, Sparsity

_UNCHANGED = (
    "Zeros are stored like any other weight: the files are as large as those of the dense model, "
    "and it runs no faster, unless what runs it packs the weights and has kernels for that."
)
_FIELDS = {  # of a matrix: what its map says
    "reached": "share of zeros",
    "energy": "kept energy of Wanda's metric",
    "error": "relative error of the output",
}
_PROTOCOL = ("data", "seq_length", "windows", "dtype")  # alike in models that are compared


def sparsity_section(inputs: Inputs) -> Section | None:
    """Maps of each record, how the zeros were made, and perplexity against sparsity.

    Returns:
        None when no input is sparse.
    """
    records = inputs.sparse
    judged = {label: x.values for label, x in inputs.judgements.items()}
    pictures = [*_cost_pictures(judged)]
    if not records and not pictures:
        return None
    parts: list[Picture | Table] = [*pictures]
    for label, record in records.items():
        parts += [_map(label, record)] if record.tensors else []
    if records:
        parts += [_kinds_table(records), _records_table(records)]
    sheets = [] if not records else [_matrix_sheet(records)]
    if pictures:
        sheets.append(_cost_sheet(judged))
    said = [_sentence(label, record) for label, record in records.items()]
    return Section(
        anchor="sparsity",
        title="Sparsity",
        text=" ".join([*said, _UNCHANGED]),
        parts=parts,
        sheets=sheets,
    )


def _sentence(label: str, record: Sparsity) -> str:
    return (
        f"{label}: {record.words}; {record.reached:.2%} of the weights of "
        f"{len(record.tensors)} matrices were set to zero."
    )


def _kind(name: str) -> str:
    """A matrix without its layer: ``linear_q``."""
    return split_layer(name)[1].removesuffix(".weight").rpartition(".")[2]


def _grid(record: Sparsity, field: str) -> tuple[list[int], list[str], list[list[float]]]:
    """Layers, kinds of matrices, and a row of values for each layer; NaN where there is none."""
    kinds = list(dict.fromkeys(map(_kind, record.tensors)))
    layers = sorted({layer or 0 for layer, _ in map(split_layer, record.tensors)})
    values = {(split_layer(n)[0] or 0, _kind(n)): x for n, x in record.tensors.items()}

    def value(layer: int, kind: str) -> float:
        found = getattr(values.get((layer, kind)), field, None)
        return math.nan if found is None else float(found)

    return layers, kinds, [[value(layer, kind) for kind in kinds] for layer in layers]


def _map(label: str, record: Sparsity) -> Picture:
    maps = {
        words: _grid(record, field)
        for field, words in _FIELDS.items()
        if any(getattr(matrix, field) is not None for matrix in record.tensors.values())
    }
    layers, kinds, _ = next(iter(maps.values()))
    values = {words: rows for words, (_, _, rows) in maps.items()}
    lacks = any(math.isnan(x) for row in values[_FIELDS["reached"]] for x in row)
    return Picture(
        name=slug("sparsity", label),
        caption=f"{label} ({record.words}): {', '.join(values)}, of each matrix"
        + ("; what has no colour was left dense" if lacks else ""),
        draw=partial(matrix_maps, maps=values, layers=layers, kinds=kinds),
    )


def _kinds_table(records: Mapping[str, Sparsity]) -> Table:
    """Means over layers."""
    rows = []
    for label, record in records.items():
        by_kind: dict[str, list[SparseMatrix]] = {}
        for name, matrix in record.tensors.items():
            by_kind.setdefault(_kind(name), []).append(matrix)
        for kind, matrices in by_kind.items():
            cells = [_spread([getattr(x, field) for x in matrices]) for field in _FIELDS]
            rows.append((f"{label}, {kind}", str(len(matrices)), *cells))
    header = ("matrix", "layers", *_FIELDS.values())
    return Table(header=header, rows=rows, caption="Mean over layers (smallest to largest)")


def _spread(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    if not known:
        return "-"
    mean, low, high = sum(known) / len(known), min(known), max(known)
    return f"{mean:.4f}" + (f" ({low:.4f} to {high:.4f})" if high - low > 5e-5 else "")


def _records_table(records: Mapping[str, Sparsity]) -> Table:
    """How the zeros were made, so that it can be done again."""
    of = list(records.values())
    rows = [
        ("method", *(record.how for record in of)),
        ("pattern", *(record.pattern or "none" for record in of)),
        ("zeros asked for", *(f"{record.sparsity:.4%}" for record in of)),
        ("zeros reached", *(f"{record.reached:.4%}" for record in of)),
        ("model that was pruned", *(record.source_digest for record in of)),
    ]
    for key in dict.fromkeys(key for record in of for key in record.settings):
        cells = (in_words(x.settings[key]) if key in x.settings else "-" for x in of)
        rows.append((str(key), *cells))
    return Table(header=("sparse model", *records), rows=rows, caption="How the zeros were made")


def _matrix_sheet(records: Mapping[str, Sparsity]) -> Sheet:
    def rows() -> Rows:
        for label, record in records.items():
            for name, matrix in record.tensors.items():
                cells = [getattr(matrix, field) for field in _FIELDS]
                told = ("" if x is None else f"{x:.9g}" for x in cells)
                yield (label, name, f"{matrix.asked:.9g}", matrix.pattern or "", *told)

    header = ("model", "matrix", "asked", "pattern", *_FIELDS)
    return Sheet(name="sparsity", header=header, rows=rows)


def _points(judged: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[tuple[str, ...], Point]]:
    """Every judged model with its protocol; one without zeros is at 0."""
    for label, values in judged.items():
        share, perplexity = values.get("sparsity", 0.0), values["perplexity"]
        if not (_is_finite(share) and _is_finite(perplexity)):
            continue
        protocol = tuple(str(values.get(name, "-")) for name in _PROTOCOL)
        method, pattern = values.get("sparsity_method"), values.get("sparsity_pattern")
        yield (
            protocol,
            Point(
                label=label,
                series=str(method) if method else "",
                sparsity=float(share),
                perplexity=float(perplexity),
                pattern=str(pattern) if pattern else "",
            ),
        )


def _is_finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _cost_pictures(judged: Mapping[str, Mapping[str, Any]]) -> Iterator[Picture]:
    """Perplexity against sparsity, if several models were judged alike and one has zeros; a panel
    for each way they were judged."""
    by_protocol: dict[tuple[str, ...], list[Point]] = {}
    for protocol, point in _points(judged):
        by_protocol.setdefault(protocol, []).append(point)
    panels = []
    for (data, length, windows, dtype), points in by_protocol.items():
        if len(points) > 1 and any(point.series for point in points):
            title = f"{data}: {windows} windows of {length} tokens, {dtype}"
            panels.append(Panel(title=title, points=tuple(points)))
    if panels:
        yield Picture(
            name="sparsity-perplexity",
            caption="Perplexity against the share of zeros that the pruned matrices have, as "
            "evaluate found it; models judged in different ways stand apart",
            draw=partial(cost_picture, panels=panels),
        )


def _cost_sheet(judged: Mapping[str, Mapping[str, Any]]) -> Sheet:
    def rows() -> Rows:
        for protocol, x in _points(judged):
            yield (x.label, x.series, x.pattern, x.sparsity, x.perplexity, *protocol)

    header = ("model", "method", "pattern", "sparsity", "perplexity", *_PROTOCOL)
    return Sheet(name="sparsity-perplexity", header=header, rows=rows)
