"""Pictures of training: losses of several runs in one plot, and any series over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_prune.report.pictures import MANY, add_legend, new_figure, plain, use_ink
from megatron_prune.report.runs import DOMAINS, Points, thinned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# told apart on white and on black; a picture of more lines than these changes the dashes
COLORS = (
    "#2f81d6", "#e07b28", "#3fa34d", "#b65fcf", "#d6453d", "#17a2b8", "#c9a400", "#f06ba8",
    "#8a8f98", "#a0714f",
)  # fmt: skip
_DASHES = ("-", "--", ":", "-.")
_SMOOTHED_SHARE = 10  # a thick line is the mean over a tenth of the run


def line_style(number: int) -> dict[str, Any]:
    """Colour and dashes of the n-th line of a picture."""
    dashes = _DASHES[number // len(COLORS) % len(_DASHES)]
    return {"color": COLORS[number % len(COLORS)], "linestyle": dashes}


def loss_picture(
    ink: str, *, training: Mapping[str, Points], validation: Mapping[str, Points], unit: str
) -> Figure:
    """Each run's training loss as a thin line, its running mean as a thick one, validation dots."""
    figure = new_figure(9.0, 4.6)
    axes = figure.add_subplot()
    for number, name in enumerate(training):
        style, label = line_style(number), plain(name)
        points, dots = training[name], validation[name]
        if points:
            x, y = zip(*points)
            many = len(points) > MANY
            axes.plot(x, y, **style, alpha=0.3, linewidth=0.8, rasterized=many)
            mean = smoothed(y, max(1, len(y) // _SMOOTHED_SHARE))
            plot_line(axes, list(zip(x, mean)), **style, linewidth=1.8, label=label)
        if dots:
            x, y = zip(*thinned(dots, MANY))
            label_dots = None if points else label
            axes.plot(x, y, "o", color=style["color"], markersize=5, label=label_dots)
    finish_axes(axes, unit, "loss (nats per token); dots: validation", ink)
    return figure


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values, over fewer at the start."""
    return [
        sum(values[max(0, end - window) : end]) / min(window, end)
        for end in range(1, len(values) + 1)
    ]


def plot_line(axes: Any, points: Points, **style: Any) -> None:
    x, y = zip(*thinned(points, MANY))
    axes.plot(x, y, **style, marker="o" if len(x) == 1 else None, markersize=4)


def finish_axes(axes: Any, unit: str, label: str, ink: str, *, legend: bool = True) -> None:
    axes.set_xlabel(unit, fontsize=9)
    axes.set_ylabel(plain(label), fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.2, color=ink)
    if legend:
        add_legend(axes, ink)
    use_ink(axes, ink)


def panels_picture(
    ink: str, *, panels: Mapping[str, Mapping[str, Points]], unit: str, columns: int = 3
) -> Figure:
    """A panel for each quantity, a line a series; a series has one colour in all panels.

    Args:
        panels: what the vertical axis says -> series -> points. Series without points are left out.
    """
    names: Sequence[str] = list(dict.fromkeys(n for lines in panels.values() for n in lines))
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(9.0, 0.5 + 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (label, lines) in zip(grid, panels.items()):
        for name, points in lines.items():
            if points:
                style = line_style(names.index(name))
                plot_line(axes, points, **style, linewidth=1.4, label=plain(name))
        if label == DOMAINS["domain weight"]:
            axes.set_ylim(0, 1)
        finish_axes(axes, unit, label, ink, legend=axes is grid[0] or len(lines) != len(names))
    for axes in grid[len(panels) :]:
        axes.remove()
    return figure
