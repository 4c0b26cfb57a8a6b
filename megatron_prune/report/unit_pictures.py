"""Pictures of units and layers: what each is worth, and which ones a plan keeps.

Wide axes are averaged into bins, so that a picture of a 70B model stays below a megabyte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES
from megatron_prune.report.pictures import (
    COLORS,
    DROPPED,
    KEPT,
    MANY,
    MARK,
    add_colorbar,
    add_legend,
    new_figure,
    plain,
    use_ink,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 192  # columns of a wide axis: some four dots each at the page's width
NARROW = 128  # up to here every unit has a cell of its own


def unit_map(
    ink: str,
    *,
    scores: Tensor | None,
    kept: Tensor | None,
    dropped: Sequence[int],
    unit: str,
    per_group: int = 1,
) -> Figure:
    """A heat map layer x unit with the kept units outlined; every unit has a cell.

    Args:
        scores: [L, n] float; coloured as a share of the layer's largest. None: only what is kept.
        kept: [L, n] bool; None outlines nothing.
        per_group: heads of a group, for the lines between groups.
    """
    known = scores if scores is not None else kept
    assert known is not None
    layers, units = known.shape
    figure = new_figure(min(9.0, 2.4 + 0.3 * units), min(9.0, 1.1 + 0.2 * layers))
    axes = figure.add_subplot()
    if scores is not None:
        share = scores.double() / scores.double().abs().amax(1, keepdim=True).clamp(min=1e-300)
        low = min(0.0, float(share.min()))
        mesh = axes.pcolormesh(share.numpy(), cmap=COLORS, vmin=low, vmax=1, rasterized=True)
        add_colorbar(figure, mesh, axes, "score / the layer's largest", ink)
    if kept is not None:
        outline_kept(axes, kept, filled=scores is None)
    for edge in range(per_group, units, per_group) if per_group > 1 else ():
        axes.axvline(edge, color=ink if scores is None else "#f0f0f0", linewidth=1.6)
    step = max(1, -(-units // 24))
    axes.set_xticks([n + 0.5 for n in range(0, units, step)], map(str, range(0, units, step)))
    axes.set_xlim(0, units)
    axes.set_xlabel(unit, fontsize=9)
    layer_ticks(axes, layers, dropped)
    use_ink(axes, ink)
    return figure


def wide_map(
    ink: str, *, scores: Tensor | None, kept: Tensor | None, dropped: Sequence[int], unit: str
) -> Figure:
    """Maps of a wide axis in bins: scores and share kept by index, share kept by rank.

    Scores are shown in decades above the layer's median (first and last percent clipped), or
    divided by it where some are not positive, or by the layer's largest where the median is 0 (of
    gates, most of which are shut). The last map has each layer's units sorted, best on
    the left: a plan that follows these scores is a sharp edge there.
    """
    maps: list[tuple[Tensor, str, str, float, float]] = []
    if scores is not None:
        x = scores.double()
        middle, decades = x.abs().median(1, keepdim=True).values, bool((x > 0).all())
        by = "median" if bool((middle > 0).all()) else "the layer's largest"
        middle = middle if by == "median" else x.abs().amax(1, keepdim=True).clamp(min=1e-300)
        shown = binned((x / middle).log10() if decades else x / middle)
        low, high = torch.quantile(shown.flatten(), torch.tensor([0.01, 0.99]).double()).tolist()
        label = "score, decades over median" if decades else f"score / {by}"
        maps.append((shown, f"{unit}, by index", label, low, max(high, low + 1e-9)))
    if kept is not None:
        maps.append((binned(kept), f"{unit}, by index", "share kept", 0, 1))
    if kept is not None and scores is not None:
        order = torch.sort(scores, dim=1, descending=True, stable=True).indices
        by_rank = binned(kept.gather(1, order))
        maps.append((by_rank, f"{unit}, by rank of its score (best = 0)", "share kept", 0, 1))
    width, (layers, _) = _width(scores, kept), maps[0][0].shape
    each = min(4.0, 0.75 + 0.09 * layers)
    figure = new_figure(9.0, each * len(maps))
    for axes, (values, xlabel, label, low, high) in zip(
        figure.subplots(len(maps), 1, squeeze=False)[:, 0], maps
    ):
        mesh = axes.pcolormesh(
            torch.linspace(0, width, values.shape[1] + 1).numpy(),
            range(layers + 1),
            values.numpy(),
            cmap=COLORS,
            vmin=low,
            vmax=high,
            rasterized=True,
        )
        add_colorbar(figure, mesh, axes, label, ink)
        axes.set_xlabel(xlabel, fontsize=9)
        layer_ticks(axes, layers, dropped, opaque=label == "share kept")
        use_ink(axes, ink)
        if layers > 16:
            axes.tick_params(axis="y", labelsize=5.5)
    return figure


def plan_map(ink: str, *, kept: Mapping[str, Tensor], dropped: Sequence[int]) -> Figure:
    """A whole plan: a strip of hidden channels above maps layer x head and layer x FFN channel.

    Args:
        kept: bool masks by axis: ``D`` [n], ``Q`` and ``F`` [L, n].
    """
    layers, heads = kept["Q"].shape
    height = min(4.6, 0.8 + 0.13 * layers)
    figure = new_figure(9.0, 1.0 + height)
    grid = figure.add_gridspec(2, 2, width_ratios=(1, 3), height_ratios=(0.4, height))
    every = {
        "D": figure.add_subplot(grid[0, :]),
        "Q": figure.add_subplot(grid[1, 0]),
        "F": figure.add_subplot(grid[1, 1]),
    }
    for axis, axes in every.items():
        shares = binned(kept[axis].view(-1, kept[axis].shape[-1]))
        mesh = axes.pcolormesh(
            torch.linspace(0, kept[axis].shape[-1], shares.shape[1] + 1).numpy(),
            range(len(shares) + 1),
            shares.numpy(),
            cmap=COLORS,
            vmin=0,
            vmax=1,
            rasterized=True,
        )
        axes.set_xlabel(AXES[axis].unit, fontsize=9)
        if axis == "D":
            axes.set_yticks([])
        else:
            layer_ticks(axes, layers, dropped, opaque=True)
        use_ink(axes, ink)
        if layers > 16:
            axes.tick_params(axis="y", labelsize=5.5)
    every["F"].set_ylabel("")
    step = max(1, -(-heads // 8))
    every["Q"].set_xticks(
        [n + 0.5 for n in range(0, heads, step)], [str(n) for n in range(0, heads, step)]
    )
    add_colorbar(figure, mesh, list(every.values()), "share kept", ink)
    return figure


def kept_strip(ink: str, *, kept: Tensor, unit: str) -> Figure:
    """[n] bool as one row: a cell a unit, or the share kept of each bin of a wide axis."""
    figure = new_figure(9.0, 1.3)
    axes = figure.add_subplot()
    shares = binned(kept[None])
    mesh = axes.pcolormesh(
        torch.linspace(0, len(kept), shares.shape[1] + 1).numpy(),
        range(2),
        shares.numpy(),
        cmap=COLORS,
        vmin=0,
        vmax=1,
        rasterized=True,
    )
    add_colorbar(figure, mesh, axes, "share kept", ink)
    axes.set_yticks([])
    axes.set_xlabel(f"{unit}, by index", fontsize=9)
    use_ink(axes, ink)
    return figure


def sorted_scores(ink: str, *, scores: Tensor, kept: Tensor | None, unit: str) -> Figure:
    """[n] scores, best on the left; kept and dropped units in two colours, the count as a line."""
    figure = new_figure(9.0, 3.4)
    axes = figure.add_subplot()
    values, order = torch.sort(scores.double(), descending=True, stable=True)
    ranks = torch.arange(len(values))
    is_kept = torch.ones_like(ranks, dtype=torch.bool) if kept is None else kept[order]
    for mask, color, label, size in (
        (is_kept, KEPT, "kept" if kept is not None else unit, 9),
        (~is_kept, DROPPED, "dropped", 9),
    ):
        if bool(mask.any()):
            count = f" ({int(mask.sum()):,})" if kept is not None else ""
            axes.scatter(
                ranks[mask].numpy(),
                values[mask].numpy(),
                s=size,
                color=color,
                linewidths=0,
                label=label + count,
                rasterized=len(values) > MANY,
            )
    if kept is not None and not bool(kept.all()):
        axes.axvline(int(kept.sum()) - 0.5, color=ink, linewidth=1, linestyle=":")
    if bool((values > 0).all()):
        axes.set_yscale("log")
    axes.set_xlim(-len(values) * 0.01, len(values) * 1.01)
    axes.set_xlabel(f"{unit}, by rank of its score (best = 0)", fontsize=9)
    axes.set_ylabel("score", fontsize=9)
    axes.grid(alpha=0.2, color=ink)
    add_legend(axes, ink, loc="upper right")
    use_ink(axes, ink)
    return figure


def layer_bars(ink: str, *, criteria: Mapping[str, Tensor], dropped: Sequence[int]) -> Figure:
    """A row of bars a criterion, one bar a layer; dropped layers hatched in orange."""
    rows = len(criteria)
    figure = new_figure(9.0, 0.8 + 1.8 * rows)
    for axes, (name, scores) in zip(
        figure.subplots(rows, 1, squeeze=False, sharex=True)[:, 0], criteria.items()
    ):
        layers = range(len(scores))
        for is_dropped, color, hatch, label in (
            (False, KEPT, None, "kept"),
            (True, DROPPED, "////", "dropped"),
        ):
            mine = [n for n in layers if (n in dropped) == is_dropped]
            if mine:
                heights = scores[mine].tolist()
                bars = axes.bar(mine, heights, color=color, hatch=hatch, width=0.8, label=label)
                for bar in bars:
                    bar.set(edgecolor=ink if is_dropped else color, linewidth=0.5)
        axes.axhline(0, color=ink, linewidth=0.6)
        axes.set_title(plain(name), fontsize=9, loc="left", color=ink)
        axes.set_ylabel("score", fontsize=9)
        axes.set_xlim(-0.7, len(scores) - 0.3)
        axes.grid(alpha=0.2, color=ink, axis="y")
        axes.set_axisbelow(True)
        use_ink(axes, ink)
    step = max(1, -(-len(scores) // 40))
    axes.set_xticks(range(0, len(scores), step))
    axes.set_xlabel("layer", fontsize=9)
    if dropped:
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="outside upper right",
            ncols=2,
            frameon=False,
            fontsize=8,
            labelcolor=ink,
        )
    return figure


def binned(x: Tensor, bins: int = BINS) -> Tensor:
    """[L, n] -> [L, at most bins] float64: means of runs whose lengths differ by one at most."""
    edges = torch.linspace(0, x.shape[1], min(bins, x.shape[1]) + 1).round().long().tolist()
    return torch.stack([x[:, a:b].double().mean(1) for a, b in pairwise(edges)], 1)


def _width(*of: Tensor | None) -> int:
    return next(x.shape[-1] for x in of if x is not None)


def outline_kept(axes: Any, kept: Tensor, *, filled: bool) -> None:
    """One inset rectangle a kept unit."""
    from matplotlib.collections import PolyCollection

    at = kept.nonzero().tolist()
    low, high = 0.1, 0.9
    corners = ((low, low), (high, low), (high, high), (low, high))
    squares = [[(x + dx, y + dy) for dx, dy in corners] for y, x in at]
    axes.add_collection(
        PolyCollection(
            squares,
            facecolors=KEPT if filled else "none",
            edgecolors=KEPT if filled else MARK,
            linewidths=1.3 if kept.shape[1] <= 40 else 0.7,
            rasterized=len(at) > MANY,
        ),
        autolim=False,
    )


def layer_ticks(
    axes: Any, layers: int, dropped: Sequence[int], *, opaque: bool = False, greys: bool = True
) -> None:
    """Layers downwards from 0; dropped ones are greyed out and crossed where they have a label."""
    shown = range(0, layers, max(1, -(-layers // 32)))
    axes.set_yticks([n + 0.5 for n in shown], [f"{n} ✕" if n in dropped else f"{n}" for n in shown])
    axes.set_ylim(layers, 0)
    axes.set_ylabel("layer", fontsize=9)
    alpha = 1 if opaque else 0.75
    if not greys:
        return
    for first in (n for n in dropped if n - 1 not in dropped):  # one span a run: no seams in it
        end = next(n for n in range(first, layers + 1) if n not in dropped)
        axes.axhspan(first, end, facecolor="#808080", alpha=alpha, linewidth=0)
