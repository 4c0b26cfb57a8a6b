"""Figures of a report: what one is, how it becomes an SVG or a PNG, and what they all share.

Every figure is drawn in one ink: black for a PNG on white, and for the page the colour of the
text around it (``currentColor``), so that one SVG is right in light, in dark and on paper. Large
meshes are rasterised inside the SVG. No pyplot: nothing global, and no display is looked for.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAPER_INK = "#1b1f24"
PAGE_INK = "#010203"  # no figure uses it for anything else; becomes currentColor
KEPT, DROPPED, MARK = "#2f81d6", "#e07b28", "#ff5a36"  # told apart in light, dark and grey
COLORS = "viridis"
MANY = 500  # shapes from which a raster is smaller than an SVG's paths


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure before it is drawn: what it is called and says, and how to draw it in an ink.

    Attributes:
        name: of the PNG file, without suffix.
        is_folded: shown on demand, below a line that says its caption.
    """

    name: str
    caption: str
    draw: Callable[[str], Figure]
    is_folded: bool = False


def as_png(picture: Picture) -> bytes:
    """The figure on opaque white, in 256 colours, which makes the file half as large."""
    from PIL import Image  # matplotlib brings it

    buffer = io.BytesIO()
    picture.draw(PAPER_INK).savefig(buffer, format="png", dpi=140, facecolor="white")
    image = Image.open(buffer).convert("RGB")
    palette = image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def as_svg(picture: Picture) -> str:
    """An ``<svg>`` element for an HTML page: no prologue, ids of its own, text as text."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name}):
        picture.draw(PAGE_INK).savefig(
            buffer, format="svg", dpi=144, transparent=True, metadata=none
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [^';]*?)'[^;]*sans-serif", r"\1sans-serif", text)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{picture.name}-", text)
    return text.replace(PAGE_INK, "currentColor")


def plain(text: str, limit: int = 40) -> str:
    """A user's text for a figure: shortened, and no ``$`` starts a formula."""
    text = text if len(text) <= limit else text[: limit - 1] + "…"
    return text.replace("$", r"\$")


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def use_ink(axes: Any, ink: str) -> None:
    """Everything of a plot that is neither data nor its colours, in the ink."""
    axes.set_facecolor("none")
    axes.tick_params(colors=ink, labelsize=8)
    for part in (axes.xaxis.label, axes.yaxis.label, axes.title, axes.xaxis.get_offset_text()):
        part.set_color(ink)
    axes.yaxis.get_offset_text().set_color(ink)
    for spine in axes.spines.values():
        spine.set_color(ink)
        spine.set_alpha(0.4)


def add_colorbar(figure: Figure, mesh: Any, axes: Any, label: str, ink: str) -> None:
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, fraction=0.035, aspect=30)
    bar.set_label(label, fontsize=8, color=ink)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=ink, labelsize=7)


def add_legend(axes: Any, ink: str, **where: Any) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=ink, **where)
