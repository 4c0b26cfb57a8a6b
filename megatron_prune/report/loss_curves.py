"""Loss curves of one or several trainings as one picture.

    python -m megatron_prune.report.loss_curves --save curves.png recovered=DIR/metrics.jsonl ...

Reads what ``train`` appends to ``metrics.jsonl``: one JSON object a line with ``iteration`` and
``lm loss``, and ``validation loss`` where it was measured. A line that a killed run left half
written at the end is passed over; one in the middle is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import PruneError
from megatron_prune.report.runs import LOSS, VALIDATION, read_rows


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """Points ``(iteration, loss)`` of one training, each list by rising iteration."""

    training: list[tuple[int, float]]
    validation: list[tuple[int, float]]


def read_loss_curve(path: Path) -> LossCurve:
    """The losses in a ``metrics.jsonl``; of an iteration logged twice, the later value.

    Raises:
        ConfigError: no such file, no loss in it, or a line that is not a JSON object.
    """
    rows = read_rows(path)

    def losses(key: str) -> list[tuple[int, float]]:
        return [(int(row["iteration"]), float(row[key])) for row in rows if key in row]

    return LossCurve(training=losses(LOSS), validation=losses(VALIDATION))


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values, over fewer at the start."""
    return [
        sum(values[max(0, end - window) : end]) / min(window, end)
        for end in range(1, len(values) + 1)
    ]


def plot_loss_curves(curves: Mapping[str, LossCurve], save: Path, *, title: str = "") -> None:
    """Write a PNG: each training as a thin line, its mean over 5% of it as a thick one.

    Validation losses are dots. Replaces ``save`` once the picture is whole.
    """
    # Figure and canvas without pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, curve) in enumerate(curves.items()):
        color = f"C{number}"
        label: str | None = name
        if curve.training:
            iterations, losses = zip(*curve.training)
            axes.plot(iterations, losses, color=color, alpha=0.3, linewidth=0.8)
            mean = smoothed(losses, max(1, len(losses) // 20))
            axes.plot(iterations, mean, color=color, linewidth=1.8, label=label)
            label = None  # one entry in the legend
        if curve.validation:
            iterations, losses = zip(*curve.validation)
            axes.plot(iterations, losses, "o", color=color, markersize=5, label=label)
    axes.set_xlabel("iteration")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss (nats per token); dots: validation")
    axes.grid(alpha=0.3)
    axes.legend()
    if title:
        axes.set_title(title)
    save.parent.mkdir(parents=True, exist_ok=True)
    part = save.with_name(f".{save.name}.part")
    FigureCanvasAgg(figure).print_png(part)
    part.replace(save)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, required=True, metavar="PNG")
    parser.add_argument("--title", default="")
    parser.add_argument("curves", nargs="+", metavar="NAME=METRICS_JSONL")
    args = parser.parse_args()
    curves = {}
    for text in args.curves:
        name, equals, path = text.partition("=")
        if not equals:
            parser.error(f"{text!r}: wanted NAME=PATH of a metrics.jsonl")
        curves[name] = read_loss_curve(Path(path))
    plot_loss_curves(curves, args.save, title=args.title)


if __name__ == "__main__":
    try:
        main()
    except PruneError as error:
        raise SystemExit(f"loss_curves: error: {error}") from None
