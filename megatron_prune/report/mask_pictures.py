"""Pictures of learned masks: shares against their targets, layers over iterations, and gates.

Bright is what stays, dark what goes, in all maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES
from megatron_prune.report.masks import Shares
from megatron_prune.report.pictures import (
    COLORS,
    MARK,
    add_colorbar,
    new_figure,
    plain,
    use_ink,
)
from megatron_prune.report.run_pictures import finish_axes, line_style, plot_line
from megatron_prune.report.runs import Points
from megatron_prune.report.unit_pictures import BINS, NARROW, binned, layer_ticks, outline_kept

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ROOM = 40  # marks that a row or a column has room for


def target_picture(
    ink: str, *, panels: Mapping[str, Mapping[str, tuple[Points, Points]]]
) -> Figure:
    """A panel for each quantity; each run's expected share as a line, its target dotted.

    Args:
        panels: the quantity -> run -> what is expected to go, and the target.
    """
    runs = list(dict.fromkeys(run for lines in panels.values() for run in lines))
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure = new_figure(9.0, 0.5 + 2.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (quantity, lines) in zip(grid, panels.items()):
        for run, (expected, target) in lines.items():
            style = line_style(runs.index(run))
            is_alone = len(runs) == 1
            said = "expected" if is_alone else plain(run)
            plot_line(axes, expected, **style, linewidth=1.5, label=said)
            if target:
                dots = {"color": ink if is_alone else style["color"], "linestyle": ":"}
                plot_line(axes, target, **dots, label="target" if is_alone else None)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
        has_legend = axes is grid[0] or len(lines) != len(runs)
        finish_axes(axes, "iteration", f"{quantity} that go", ink, legend=has_legend)
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure


def share_maps(
    ink: str,
    *,
    shares: Mapping[str, Shares],
    crossed: Mapping[str, Mapping[int, float]],
    dropped: Sequence[int],
) -> Figure:
    """Heat maps layer x iteration of the share that is expected to be gone, side by side.

    Args:
        shares: what goes -> its shares.
        crossed: of some of these, layer -> the iteration at which it gets a cross.
        dropped: layers that the plan leaves out, whose labels have a cross.
    """
    columns = min(len(shares), 2 if len(shares) == 4 else 3)
    rows = -(-len(shares) // columns)
    layers = max(len(x.rows[0]) for x in shares.values())
    figure = new_figure(9.0, rows * min(4.4, 1.4 + 0.12 * layers))
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (what, of) in zip(grid, shares.items()):
        values = torch.tensor(of.rows, dtype=torch.float64).T
        mesh = axes.pcolormesh(
            _edges(of.iterations),
            range(len(values) + 1),
            binned(values).numpy(),
            cmap=f"{COLORS}_r",
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        for layer, iteration in crossed.get(what, {}).items():
            size = 9 if len(values) <= _ROOM else 5
            cross = {"markerfacecolor": "#ffffff", "markeredgecolor": "#101418"}
            axes.plot(iteration, layer + 0.5, "X", **cross, markersize=size, markeredgewidth=0.8)
        axes.set_title(what, fontsize=9, loc="left", color=ink)
        axes.set_xlabel("iteration", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        layer_ticks(axes, len(values), dropped, greys=False)
        use_ink(axes, ink)
        if len(values) > 16:
            axes.tick_params(axis="y", labelsize=5.5)
    for axes in grid[len(shares) :]:
        axes.remove()
    add_colorbar(figure, mesh, list(grid[: len(shares)]), "share gone", ink)
    return figure


def _edges(iterations: Sequence[float]) -> list[float]:
    """Where the columns of a map in bins begin and end: a row stands for what came after the row
    before it."""
    first = iterations[0] - (iterations[1] - iterations[0] if len(iterations) > 1 else 1)
    edges = [first, *iterations]
    columns = min(BINS, len(iterations))
    at = torch.linspace(0, len(iterations), columns + 1).round().long().tolist()
    return [edges[n] for n in at]


def gate_maps(
    ink: str,
    *,
    gates: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    dropped: Sequence[int],
) -> Figure:
    """All gates of a model: strips of hidden channels and layers above maps layer x unit.

    Hidden and FFN channels are sorted, the widest open on the left, and a line stands where as many
    are as stay; heads, groups and layers stand by index, the kept ones outlined where cells have
    room.

    Args:
        gates: axis letter -> [n] of hidden channels and layers, [L, n] of all others.
        kept: bool masks of the same shapes; empty outlines nothing.
    """
    rows = {letter: x if x.dim() == 2 else x[None] for letter, x in gates.items()}
    strips = [letter for letter in "DL" if letter in rows]
    maps = [letter for letter in "QKF" if letter in rows]
    figure, every = _places(strips, {letter: rows[letter] for letter in maps})
    for letter, axes in every.items():
        values, stays = rows[letter], kept.get(letter)
        stays = stays if stays is None or stays.dim() == 2 else stays[None]
        is_sorted = letter in "DF"
        shown = values.sort(dim=1, descending=True).values if is_sorted else values
        shown = binned(shown)
        mesh = axes.pcolormesh(
            torch.linspace(0, values.shape[1], shown.shape[1] + 1).numpy(),
            range(len(shown) + 1),
            shown.numpy(),
            cmap=COLORS,
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        if stays is not None and is_sorted:
            counts = {layer: int(n) for layer, n in enumerate(stays.sum(1)) if n}
            ends = [layer + 1 for layer in counts]
            axes.vlines([*counts.values()], [*counts], ends, color=MARK, linewidth=1.6)
        elif stays is not None and (letter == "L" or max(values.shape) <= _ROOM):
            outline_kept(axes, stays, filled=False)
        _label_units(axes, values.shape[1], AXES[letter].unit, is_sorted=is_sorted)
        if letter in strips:
            axes.set_yticks([])
        else:
            layer_ticks(axes, len(values), dropped, opaque=True)
        use_ink(axes, ink)
        if letter in maps:
            axes.set_ylabel("layer" if letter == maps[0] else "")
            axes.tick_params(axis="y", labelsize=5.5 if len(values) > 16 else 8)
    add_colorbar(figure, mesh, list(every.values()), "gate", ink)
    return figure


def _places(strips: Sequence[str], maps: Mapping[str, Tensor]) -> tuple[Figure, dict[str, Any]]:
    """A figure with a row for each strip and one for all maps, wide ones with more of its width."""
    layers = max((len(x) for x in maps.values()), default=0)
    heights = [0.45] * len(strips) + ([min(4.6, 0.8 + 0.13 * layers)] if maps else [])
    figure = new_figure(9.0, 0.3 + sum(heights) + 0.5 * len(heights))
    widths = [3 if letter == "F" else 1 + 0.5 * (x.shape[1] > 16) for letter, x in maps.items()]
    grid = figure.add_gridspec(
        len(heights), len(maps) or 1, height_ratios=heights, width_ratios=widths or None
    )
    every = {letter: figure.add_subplot(grid[at, :]) for at, letter in enumerate(strips)}
    every |= {letter: figure.add_subplot(grid[-1, at]) for at, letter in enumerate(maps)}
    return figure, every


def _label_units(axes: Any, count: int, unit: str, *, is_sorted: bool) -> None:
    axes.set_xlabel(f"{unit}, by rank of its gate (best = 0)" if is_sorted else unit, fontsize=9)
    axes.set_xlim(0, count)
    if not is_sorted and count <= NARROW:
        step = max(1, -(-count // (8 if unit != "layer" else 40)))
        axes.set_xticks([n + 0.5 for n in range(0, count, step)], map(str, range(0, count, step)))
