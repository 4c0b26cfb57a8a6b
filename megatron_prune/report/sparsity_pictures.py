"""Pictures of zeros: maps layer x matrix, and what they cost in perplexity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_prune.model.lazy import np
from megatron_prune.report.pictures import (
    COLORS,
    add_legend,
    new_figure,
    plain,
    use_ink,
)
from megatron_prune.report.run_pictures import line_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 16  # layers up to which a cell has room for its number
_NARROWEST = 0.02  # range of a map's colours: what is all but equal shall look so


@dataclass(frozen=True, kw_only=True)
class Point:
    """A judged model.

    Attributes:
        series: the method; empty for a dense model.
        sparsity: share of zeros, 0 to 1.
        pattern: empty for zeros anywhere.
    """

    label: str
    series: str
    sparsity: float
    perplexity: float
    pattern: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Models that were judged alike."""

    title: str
    points: tuple[Point, ...]


def matrix_maps(
    ink: str,
    *,
    maps: Mapping[str, Sequence[Sequence[float]]],
    layers: Sequence[int],
    kinds: Sequence[str],
) -> Figure:
    """Heat maps side by side, a row a layer and a column a kind of matrix.

    Args:
        maps: what the colours say -> rows of values, NaN where a matrix has none.
        layers: their numbers; ``kinds``: names of the columns.
    """
    height = min(9.0, 1.7 + (0.3 if len(layers) <= _FEW else 0.14) * len(layers))
    figure = new_figure(min(9.0, 1.2 + 3.6 * len(maps)), height)
    shown = range(0, len(layers), max(1, -(-len(layers) // 32)))
    for number, (axes, (label, rows)) in enumerate(
        zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items())
    ):
        values = np.ma.masked_invalid(np.array(rows, dtype=float))
        low, high = _color_range(values)
        mesh = axes.pcolormesh(values, cmap=COLORS, vmin=low, vmax=high, rasterized=True)
        _color_bar(figure, mesh, axes, label, ink)
        axes.set_xticks(
            [n + 0.5 for n in range(len(kinds))],
            [plain(kind.removeprefix("linear_"), 12) for kind in kinds],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_yticks([n + 0.5 for n in shown], [str(layers[n]) for n in shown])
        axes.set_ylim(len(layers), 0)
        axes.set_ylabel("layer" if number == 0 else "", fontsize=9)
        if len(layers) <= _FEW and len(maps) * len(kinds) <= 24:
            _write_numbers(axes, values, low, high)
        use_ink(axes, ink)
        axes.tick_params(length=0)
        if len(layers) > _FEW:
            axes.tick_params(axis="y", labelsize=6)
    return figure


def _color_bar(figure: Figure, mesh: Any, axes: Any, label: str, ink: str) -> None:
    """A colour bar above a map: beside it there is no room for three."""
    bar = figure.colorbar(mesh, ax=axes, location="top", pad=0.02, fraction=0.05, aspect=25)
    bar.set_label(label, fontsize=8, color=ink)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=ink, labelsize=7)
    bar.ax.locator_params(nbins=5)


def _color_range(values: Any) -> tuple[float, float]:
    if values.count() == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    if (missing := _NARROWEST - (high - low)) > 0:
        low, high = low - missing / 2, high + missing / 2
    return low, high


def _write_numbers(axes: Any, values: Any, low: float, high: float) -> None:
    for y, x in zip(*np.nonzero(~np.ma.getmaskarray(values))):
        value = float(values[y, x])
        axes.text(
            x + 0.5,
            y + 0.5,
            f"{value:.2f}".replace("0.", ".", 1),
            ha="center",
            va="center",
            fontsize=7,
            color="#101418" if (value - low) / (high - low) > 0.6 else "#ffffff",
        )


def cost_picture(ink: str, *, panels: Sequence[Panel]) -> Figure:
    """A panel for each way of judging: a line a method, a point a model; dense ones as levels."""
    figure = new_figure(9.0, 0.4 + 3.8 * len(panels))
    series = list(dict.fromkeys(x.series for panel in panels for x in panel.points if x.series))
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels):
        for point in (x for x in panel.points if not x.series):
            axes.axhline(point.perplexity, color=ink, linewidth=1, linestyle=":")
            axes.annotate(
                plain(point.label.removesuffix(".json")),
                (0.995, point.perplexity),
                xycoords=("axes fraction", "data"),
                ha="right",
                xytext=(0, 3),
                textcoords="offset points",
                fontsize=8,
                color=ink,
            )
        for number, name in enumerate(series):
            _plot_series(axes, [x for x in panel.points if x.series == name], number, name, ink)
        perplexities = [x.perplexity for x in panel.points]
        if min(perplexities) > 0 and max(perplexities) / min(perplexities) > 10:
            axes.set_yscale("log")
        axes.set_title(plain(panel.title, 90), fontsize=9, loc="left", color=ink)
        axes.set_xlabel("share of zeros in the pruned matrices", fontsize=9)
        axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.4g}%")
        axes.set_ylabel("perplexity", fontsize=9)
        axes.grid(alpha=0.2, color=ink)
        add_legend(axes, ink)
        use_ink(axes, ink)
    return figure


def _plot_series(axes: Any, points: Sequence[Point], number: int, name: str, ink: str) -> None:
    """Zeros anywhere are joined by a line; a pattern is a point of its own, with its name. Two of
    one sparsity (before and after training, say) are told apart by their labels."""
    style, said = line_style(number), plain(name)
    free = sorted((x for x in points if not x.pattern), key=lambda x: x.sparsity)
    if free:
        x, y = [p.sparsity for p in free], [p.perplexity for p in free]
        axes.plot(x, y, marker="o", **style, label=said)
    patterned = [x for x in points if x.pattern]
    for at, point in enumerate(patterned):
        axes.plot(
            point.sparsity,
            point.perplexity,
            "D",
            color=style["color"],
            markersize=7,
            markerfacecolor="none",
            markeredgewidth=1.6,
            label=said if at == 0 and not free else None,
        )
    places = [(x.pattern, round(x.sparsity, 3)) for x in points]
    for at, (point, place) in enumerate(zip(points, places)):
        words = [point.pattern] if point.pattern else []
        if is_double := places.count(place) > 1:
            words.append(point.label.removesuffix(".json"))
            axes.margins(x=0.2)  # room for labels on both sides
        is_left = is_double and at % 2 == 1
        axes.annotate(
            plain(" ".join(words), 28),
            (point.sparsity, point.perplexity),
            xytext=(-8 if is_left else 8, -3),
            textcoords="offset points",
            ha="right" if is_left else "left",
            fontsize=8,
            color=ink,
        )
