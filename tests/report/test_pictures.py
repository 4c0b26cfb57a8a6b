"""What is drawn is what was given: the numbers are read back out of the figures."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure

from megatron_prune.report.charts import front, overlap_matrix, pareto
from megatron_prune.report.pictures import PAGE_INK, Picture, as_png, as_svg
from megatron_prune.report.unit_pictures import (
    binned,
    kept_strip,
    layer_bars,
    plan_map,
    sorted_scores,
    unit_map,
    wide_map,
)

INK = "#000000"


def meshes(figure: Figure) -> list[np.ndarray]:
    """The values of every heat map, in order; colour bars are meshes too, of one column."""
    found = [c for axes in figure.axes for c in axes.collections if isinstance(c, QuadMesh)]
    return [np.asarray(mesh.get_array()) for mesh in found if mesh.get_array().shape[-1] > 1]


def test_a_unit_map_colours_scores_and_outlines_the_kept() -> None:
    scores = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 1.5]])
    kept = torch.tensor([[False, True, True], [True, False, False]])
    figure = unit_map(INK, scores=scores, kept=kept, dropped=(1,), unit="head", per_group=3)
    assert meshes(figure)[0].tolist() == [[0.25, 0.5, 1.0], [1.0, 0.0, 0.5]]
    axes = figure.axes[0]
    (outline,) = (c for c in axes.collections if isinstance(c, PolyCollection))
    cells = [tuple(path.vertices.min(0).astype(int)) for path in outline.get_paths()]
    assert sorted(cells) == [(0, 1), (1, 0), (2, 0)]  # head, layer
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1 ✕"]
    assert axes.get_ylim() == (2, 0)


def test_a_wide_map_shows_bins_of_scores_of_what_is_kept_and_of_ranks() -> None:
    scores = torch.rand(3, 400, generator=torch.Generator().manual_seed(1)) + 0.1
    kept = scores > scores.median(1, keepdim=True).values
    figure = wide_map(INK, scores=scores, kept=kept, dropped=(), unit="channel")
    by_index, share, by_rank = meshes(figure)
    decades = (scores.double() / scores.double().median(1, keepdim=True).values).log10()
    assert np.allclose(by_index, binned(decades).numpy())
    assert np.allclose(share, binned(kept).numpy())
    assert by_rank[:, :95].min() == 1 and by_rank[:, 97:].max() == 0  # sorted: a sharp edge


def test_wide_maps_take_scores_that_are_not_positive_and_plans_without_scores() -> None:
    scores = torch.linspace(-1, 1, 400).repeat(2, 1)
    assert len(meshes(wide_map(INK, scores=scores, kept=None, dropped=(), unit="channel"))) == 1
    kept = scores > 0
    (share,) = meshes(wide_map(INK, scores=None, kept=kept, dropped=(), unit="channel"))
    assert share.mean() == pytest.approx(0.5)
    shut = torch.where(torch.arange(400) < 150, torch.linspace(1, 0.1, 400), 0.0).repeat(2, 1)
    figure = wide_map(INK, scores=shut * 5, kept=None, dropped=(), unit="channel")  # median 0
    assert np.allclose(meshes(figure)[0], binned(shut).numpy())


def test_a_plan_map_shows_each_axis_s_share() -> None:
    heads = torch.tensor([[True, False, True], [False, False, False]])
    wide = torch.arange(400).repeat(2, 1) % 2 == 0
    kept = {"Q": heads, "F": wide, "D": torch.arange(8) < 6}
    figure = plan_map(INK, kept=kept, dropped=(1,))
    hidden, of_heads, of_ffn = meshes(figure)
    assert hidden.tolist() == [[1] * 6 + [0] * 2] and of_heads.tolist() == heads.double().tolist()
    assert np.allclose(of_ffn, binned(wide).numpy()) and of_ffn.shape == (2, 192)
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["0", "1 ✕"]


@pytest.mark.parametrize("width", [5, 192, 193, 1000])
def test_bins_are_means_of_runs_and_cover_every_unit_once(width: int) -> None:
    x = torch.arange(2 * width).view(2, width).float()
    found = binned(x)
    assert found.shape == (2, min(width, 192))
    if width <= 192:
        assert torch.equal(found, x.double())
    if width == 1000:
        assert float(found[0, 0]) == pytest.approx(sum(range(5)) / 5, abs=0.5)


def test_sorted_scores_are_sorted_and_marked() -> None:
    scores, kept = torch.tensor([3.0, 9.0, 1.0, 5.0]), torch.tensor([True, False, False, True])
    axes = sorted_scores(INK, scores=scores, kept=kept, unit="hidden channel").axes[0]
    dots = {c.get_label(): c.get_offsets().tolist() for c in axes.collections}
    assert dots == {"kept (2)": [[1, 5], [2, 3]], "dropped (2)": [[0, 9], [3, 1]]}
    assert axes.get_yscale() == "log" and axes.lines[0].get_xdata()[0] == 1.5


def test_layer_bars_are_the_scores_and_dropped_ones_are_hatched() -> None:
    criteria = {"activation": torch.tensor([0.4, 0.1, 0.2]), "b$x$": torch.tensor([1.0, -2.0, 3.0])}
    figure = layer_bars(INK, criteria=criteria, dropped=(1,))
    for axes, scores in zip(figure.axes, criteria.values()):
        bars = {round(bar.get_x() + 0.4): bar for bar in axes.patches}
        assert [bars[n].get_height() for n in range(3)] == scores.tolist()
        assert [bool(bars[n].get_hatch()) for n in range(3)] == [False, True, False]
    assert figure.axes[1].get_title(loc="left") == r"b\$x\$"  # no formula


def test_an_overlap_matrix_writes_each_share_into_its_cell() -> None:
    shares = torch.tensor([[1.0, 0.25], [0.5, 1.0]])
    axes = overlap_matrix(INK, names=["a", "b"], shares=shares, chance=0.3).axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[1.5, 0.5] == "25%" and cells[0.5, 1.5] == "50%"


def test_the_front_is_what_nothing_beats() -> None:
    x, y = [5, 1, 3, 3, 4, 1], [1.0, 9.0, 4.0, 5.0, 4.0, 9.5]
    beaten = {
        n
        for n in range(6)
        for m in range(6)
        if x[m] <= x[n] and y[m] <= y[n] and (x[m], y[m]) != (x[n], y[n])
    }
    assert front(x, y) == [1, 2, 0] and set(front(x, y)) == set(range(6)) - beaten


def test_pareto_shows_what_was_measured_the_budget_and_the_chosen() -> None:
    figure = pareto(
        INK,
        costs=[1.0, 2.0, 3.0],
        cost_label="memory (GiB)",
        limit=2.5,
        values={"proxy": [3.0, 2.0, 1.0], "loss": [None, 5.0, 6.0]},
        marked={"shape of plan.json": 1, "source": 0},
    )
    first, second = figure.axes
    assert second.collections[0].get_offsets().tolist() == [[2, 5], [3, 6]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in second.lines}
    assert lines["Pareto front"] == [[2, 5]] and lines["shape of plan.json"] == [[2, 5]]
    assert "source" not in lines  # it was not measured
    assert lines["budget"][0][0] == 2.5 and first.get_xlabel() == "memory (GiB)"


def test_a_picture_is_the_same_every_time_and_in_the_page_s_ink() -> None:
    draw = partial(kept_strip, kept=torch.arange(10) % 3 > 0, unit="layer")
    picture = Picture(name="one", caption="", draw=draw)
    svg = as_svg(picture)
    assert svg == as_svg(picture) and as_png(picture) == as_png(picture)
    assert svg.startswith("<svg") and "currentColor" in svg and PAGE_INK not in svg
    assert svg.count(' id="') == svg.count(' id="one-') > 0
    assert as_png(picture).startswith(b"\x89PNG")
