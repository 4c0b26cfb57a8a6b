"""Pictures that compare: criteria with each other, and the shapes that a budget search tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from megatron_prune.model.lazy import Tensor
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


def overlap_matrix(ink: str, *, names: Sequence[str], shares: Tensor, chance: float) -> Figure:
    """[n, n] shares kept in common, each written into its cell; colours begin at chance."""
    side = len(names)
    figure = new_figure(2.8 + 0.58 * side, 1.5 + 0.42 * side)
    axes = figure.add_subplot()
    low = min(chance, float(shares.min()), 0.99)
    mesh = axes.pcolormesh(shares.numpy(), cmap=COLORS, vmin=low, vmax=1, rasterized=True)
    add_colorbar(figure, mesh, axes, "share in common", ink)
    for y in range(side):
        for x in range(side):
            share = float(shares[y, x])
            light = (share - low) / (1 - low) > 0.6
            axes.text(
                x + 0.5,
                y + 0.5,
                f"{share:.0%}",
                ha="center",
                va="center",
                fontsize=8,
                color="#101418" if light else "#ffffff",
            )
    labels = [plain(name, 24) for name in names]
    at = [n + 0.5 for n in range(side)]
    axes.set_xticks(at, labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(at, labels)
    axes.set_ylim(side, 0)
    use_ink(axes, ink)
    axes.tick_params(length=0)
    return figure


def pareto(
    ink: str,
    *,
    costs: Sequence[float],
    cost_label: str,
    limit: float | None,
    values: Mapping[str, Sequence[float | None]],
    marked: Mapping[str, int],
) -> Figure:
    """A panel for each of ``values`` (lower is better) over a cost, with the Pareto front.

    Args:
        limit: the budget, in the units of ``costs``; None draws no line.
        values: what the vertical axis says -> one value a candidate, None where not measured.
        marked: label of a shape -> its candidate, shown as a star.
    """
    figure = new_figure(9.0, 4.2)
    panels = figure.subplots(1, len(values), squeeze=False)[0]
    for axes, (name, column) in zip(panels, values.items()):
        have = [n for n, value in enumerate(column) if value is not None]
        x, y = [costs[n] for n in have], [float(column[n] or 0.0) for n in have]
        best = front(x, y)
        many = len(x) > MANY
        axes.scatter(x, y, s=14, color="#8a8f98", linewidths=0, rasterized=many, label="tried")
        axes.plot(
            [x[n] for n in best],
            [y[n] for n in best],
            "o-",
            color=KEPT,
            linewidth=1.4,
            markersize=5,
            drawstyle="steps-post",
            label="Pareto front",
        )
        if limit is not None:
            axes.axvline(limit, color=ink, linewidth=1, linestyle=":", label="budget")
        for star, (label, number) in enumerate(marked.items()):
            if number in have:
                at = have.index(number)
                color = (MARK, DROPPED)[star % 2]
                axes.plot(x[at], y[at], "*", color=color, markersize=15, label=plain(label))
        axes.set_xlabel(plain(cost_label), fontsize=9)
        axes.set_ylabel(plain(name), fontsize=9)
        axes.grid(alpha=0.2, color=ink)
        add_legend(axes, ink)
        use_ink(axes, ink)
    return figure


def front(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Which points no other is at most as large as in both and smaller in one; by rising x."""
    best, found = float("inf"), []
    for n in sorted(range(len(x)), key=lambda n: (x[n], y[n])):
        if y[n] < best:
            best = y[n]
            found.append(n)
    return found
