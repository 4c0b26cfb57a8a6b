"""Learned masks on the page: the numbers of a run's metrics, its gates, and what a run lacks."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PolyCollection
from torch import Tensor

from megatron_prune.errors import PlanError
from megatron_prune.planning.choose import Targets
from megatron_prune.planning.scores import Scores, score_shape
from megatron_prune.report.inputs import read_inputs
from megatron_prune.report.mask_pictures import gate_maps, share_maps, target_picture
from megatron_prune.report.mask_sections import mask_section
from megatron_prune.report.masks import Shares, held_words, shares_gone
from megatron_prune.report.page import Section, Table
from megatron_prune.report.pictures import Picture
from megatron_prune.report.run_sections import command_section
from megatron_prune.report.runs import Run, read_run
from megatron_prune.shearing.words import MASK_SCORES
from tests.pico import ok
from tests.report.inputs import SHAPE, make_scores, plan_of, write_plan, write_scores
from tests.report.test_page import Reader
from tests.report.test_pictures import INK, meshes
from tests.report.test_runs import row, write_run

GONE = {  # of each layer, at iterations 1 to 4
    "ffn": ([0.0, 0.1, 0.0, 0.0], [0.2] * 4, [0.3] * 4, [0.4, 0.3, 0.4, 0.4]),
    "layers": ([0.0] * 4, [0.6, 0.0, 0.7, 0.0], [0.4, 0.1, 0.9, 0.0], [0.5, 0.1, 0.95, 0.75]),
}


def told(n: int, words: Sequence[str] = ("hidden", "ffn", "layers"), **more: Any) -> dict[str, Any]:
    """What `shear` logs of iteration n, in short."""
    values: dict[str, Any] = {}
    for at, word in enumerate(words):
        values[f"expected sparsity {word}"] = n / 20 + at / 100
        values[f"target sparsity {word}"] = min(n, 3) / 12
        values[f"lambda 1 {word}"] = -1.5 * n
        values[f"lambda 2 {word}"] = 2.0 * n + at
    gone = {word: rows[n - 1] for word, rows in GONE.items()}
    return row(n, **values, **{"share gone by layer": gone}) | more


def gates(seed: int = 1, digest: str = "5eed" * 16, axes: str = "DFL") -> Scores:
    generator = torch.Generator().manual_seed(seed)
    of = {axis: torch.rand(score_shape(axis, SHAPE), generator=generator) for axis in axes}
    of["L"][0] = 0.0  # it goes
    return replace(make_scores(digest=digest), criteria={"gates": of})


CUT = Targets(hidden_size=36, ffn_hidden_size=60, num_layers=3)


def finish(run: Path, scores: Scores) -> Path:
    """What a run leaves at its end."""
    write_scores(run / MASK_SCORES, scores)
    write_plan(run / "plan.json", plan_of(scores, CUT, "gates", tp=1))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return finish(write_run(tmp_path / "sheared", *map(told, (1, 2, 3, 4))), gates())


def shown(*paths: Path) -> tuple[Section, dict[str, list[tuple[str, ...]]], set[str]]:
    """The section of these runs, rows of its tables by caption, names of its pictures; each is
    drawn."""
    section = mask_section(read_inputs(paths))
    assert section is not None
    tables = {part.caption: [*part.rows] for part in section.parts if isinstance(part, Table)}
    pictures = [part for part in section.parts if isinstance(part, Picture)]
    for picture in pictures:
        picture.draw(INK).draw_without_rendering()
    return section, tables, {picture.name for picture in pictures}


def sheet(section: Section, name: str) -> list[dict[str, Any]]:
    (found,) = (sheet for sheet in section.sheets if sheet.name == name)
    return [dict(zip(found.header, row, strict=True)) for row in found.rows()]


def test_a_finished_run_is_a_page(run: Path, tmp_path: Path) -> None:
    page, beside = tmp_path / "page.html", tmp_path / "beside"
    ok("report", run, "--save", page, "--png-dir", beside)
    reader = Reader(page.read_text())
    assert list(reader.texts)[1:] == [
        "result", "training-loss", "masks", "plan", "course", "files", "again",
    ]  # fmt: skip
    pictures = {"mask-targets", "multipliers-sheared", "mask-layers-sheared", "gates-sheared"}
    assert pictures | {"map-sheared"} <= {p.stem for p in beside.glob("*.png")}
    assert {"masks", "mask-layers", "gates"} <= {p.stem for p in beside.glob("*.csv")}
    assert "sheared keeps 3 of 4 layers, 36 of 48 hidden channels" in reader.texts["result"]
    kinds = [row[:2] for row in reader.tables["Files this page was made from"][1:]]
    assert kinds == [["sheared", "training run"], ["sheared", "plan"], ["sheared", "scores"]]


def test_targets_and_layers_are_the_numbers_of_the_metrics(run: Path) -> None:
    section, tables, _ = shown(run)
    assert tables["At the last logged iteration"] == [
        ("sheared", "hidden channels", "4", "0.2000", "0.2500", "-0.0500", "-6", "8"),
        ("sheared", "FFN channels", "4", "0.2100", "0.2500", "-0.0400", "-6", "9"),
        ("sheared", "layers", "4", "0.2200", "0.2500", "-0.0300", "-6", "10"),
    ]
    assert "has not ended" not in section.text
    course = sheet(section, "masks")
    assert len(course) == 12 and course[5]["axis"] == "ffn" and course[5]["iteration"] == "2"
    assert [*course[5].values()][3:] == [0.11, 2 / 12, -3.0, 5.0]
    layers = sheet(section, "mask-layers")
    assert len(layers) == 2 * 4 * 4
    assert [*layers[-1].values()] == ["sheared", "4", "layers", 3, 0.75]


def test_gates_are_those_of_the_file_with_what_the_plan_keeps(run: Path) -> None:
    rows, held = sheet(shown(run)[0], "gates"), gates().criteria["gates"]
    words = {"D": "hidden", "F": "ffn", "L": "layers"}
    for axis, word in words.items():
        found = torch.tensor([float(r["gate"]) for r in rows if r["axis"] == word])
        assert torch.equal(found, held[axis].flatten())
    kept = [r["axis"] for r in rows if r["kept"] == "1"]
    assert [kept.count(word) for word in words.values()] == [36, 3 * 60, 3]
    assert {r["layer"] for r in rows if r["axis"] != "ffn"} == {""}
    (dropped,) = (r for r in rows if r["axis"] == "layers" and r["kept"] == "0")
    assert dropped["unit"] == 0


def test_a_layer_died_when_its_share_gone_stays_above_a_half() -> None:
    """0.5 is not above; layer 0 came back; layer 3 died at the last."""
    shares = Shares(iterations=(1, 2, 3, 4), rows=GONE["layers"])
    assert shares.died() == [None, None, 2, 4]
    assert Shares(iterations=(5, 9), rows=([0.6, 0.6], [0.6, 0.5])).died() == [5, None]


def test_deaths_stand_in_their_order_with_what_the_plan_says(run: Path) -> None:
    assert shown(run)[1]["When layers died"] == [
        ("sheared", "2", "2", "0.9500", "kept"),
        ("sheared", "3", "4", "0.7500", "kept"),
        ("sheared", "0", "-", "0.5000", "dropped"),  # half is not enough
    ]


def test_a_run_that_has_not_ended_shows_what_there_is(tmp_path: Path) -> None:
    stopped = write_run(tmp_path / "stopped", told(1), told(2), tail='{"iter')
    section, tables, pictures = shown(stopped)
    assert "stopped has no plan beside its metrics: it has not ended." in section.text
    assert tables["When layers died"] == [
        ("stopped", "0", "2", "0.6000", "-"), ("stopped", "2", "2", "0.7000", "-"),
    ]  # fmt: skip
    assert pictures == {"mask-targets", "multipliers-stopped", "mask-layers-stopped"}
    assert {sheet.name for sheet in section.sheets} == {"masks", "mask-layers"}


def test_a_run_without_masks_shows_nothing_of_them(run: Path, tmp_path: Path) -> None:
    """Not even a plan that lies beside its metrics."""
    plain = write_run(tmp_path / "plain", row(1), row(2))
    write_plan(plain / "plan.json", plan_of(gates(), CUT, "gates", tp=1))
    inputs = read_inputs([plain])
    assert mask_section(inputs) is None and not inputs.plans and len(inputs.files) == 1
    _, tables, pictures = shown(plain, run)
    assert {row[0] for row in tables["At the last logged iteration"]} == {"sheared"}
    assert "mask-layers-plain" not in pictures
    assert not read_inputs([run / "metrics.jsonl"]).plans  # metrics alone are no directory


@pytest.mark.parametrize(
    "damage",
    [
        {"share gone by layer": {"ffn": [0.1, 0.2], "layers": [0.9] * 5}},
        {"share gone by layer": {"ffn": [0.1, "x", 0.1, 0.1], "layers": [True] * 4}},
        {"share gone by layer": {"ffn": [math.nan] * 4, "layers": []}},
        {"share gone by layer": {"ffn": 3, "layers": None}},
        {"share gone by layer": [0.5] * 4},
    ],
)
def test_damaged_rows_are_passed_over(tmp_path: Path, damage: Mapping[str, Any]) -> None:
    bad = {"expected sparsity hidden": "many", "target sparsity hidden": None}
    folder = write_run(tmp_path / "run", told(1), told(2, **damage, **bad), told(3))
    shares, read = shares_gone(read_run(folder)), read_run(folder)
    assert {word: x.iterations for word, x in shares.items()} == {"ffn": (1, 3), "layers": (1, 3)}
    assert list(shares["layers"].rows) == [GONE["layers"][0], GONE["layers"][2]]
    points = read.points("expected sparsity hidden", over_tokens=False)
    assert [at for at, _ in points] == [1, 3] and held_words(read) == ["hidden", "ffn", "layers"]
    shown(folder)


def test_the_size_of_the_model_alone_may_have_a_target(tmp_path: Path) -> None:
    rows = [told(n, words=("parameters",)) for n in (1, 2)]
    _, tables, _ = shown(write_run(tmp_path / "run", *rows))
    assert [row[1] for row in tables["At the last logged iteration"]] == ["parameters"]


def test_runs_of_two_models_stand_on_one_page_with_the_plan_of_one(
    run: Path, tmp_path: Path
) -> None:
    rows = [*map(told, (1, 2))]
    other = finish(write_run(tmp_path / "other", *rows), gates(digest="07e4" * 16))
    again = finish(write_run(tmp_path / "again", *rows), gates(seed=2))
    inputs = read_inputs([run, other, again])
    assert list(inputs.plans) == ["sheared", "again"] and set(inputs.gates) == {
        "sheared", "other", "again",
    }  # fmt: skip
    section, _, pictures = shown(run, other, again)
    assert "The plan of other is about another model" in section.text
    assert {"gates-sheared", "gates-other", "gates-again"} <= pictures
    given = read_inputs([run, run / "plan.json", run / MASK_SCORES])
    assert list(given.plans) == ["plan.json"] and given.scores is not None


def test_a_plan_and_gates_of_two_models_are_refused(run: Path) -> None:
    write_scores(run / MASK_SCORES, gates(digest="07e4" * 16))
    says = f"sheared: plan.json is about model 5eed5eed5eed5eed, sheared: {MASK_SCORES} about model"
    with pytest.raises(PlanError, match=re.escape(says)):
        read_inputs([run])


def test_a_plan_that_is_none_is_refused_by_its_name(run: Path) -> None:
    (run / "plan.json").write_text('{"candidates": []}')
    with pytest.raises(PlanError, match=re.escape(str(run / "plan.json"))):
        read_inputs([run])


def test_targets_are_dotted_beside_what_is_expected(run: Path) -> None:
    of = read_run(run)

    def both(word: str) -> tuple[list[Any], list[Any]]:
        return tuple(of.points(f"{kind} sparsity {word}", over_tokens=False)  # type: ignore[return-value]
                     for kind in ("expected", "target"))  # fmt: skip

    panels = {
        "hidden channels": {"a": both("hidden")},
        "layers": {"a": both("layers"), "b": both("layers")},
    }
    figure = target_picture(INK, panels=panels)
    hidden, layers = figure.axes
    assert [line.get_linestyle() for line in hidden.lines] == ["-", ":"]
    assert list(hidden.lines[0].get_ydata()) == [0.05, 0.1, 0.15, 0.2]
    assert list(hidden.lines[1].get_ydata()) == [1 / 12, 2 / 12, 3 / 12, 3 / 12]
    a, of_a, b, of_b = (line.get_color() for line in layers.lines)
    assert a == of_a != b == of_b


def test_a_map_of_shares_has_a_column_a_logged_iteration_and_crosses() -> None:
    shares = Shares(iterations=(10, 20, 40), rows=[[0.0, 0.2], [0.4, 0.6], [0.5, 1.0]])
    figure = share_maps(INK, shares={"layers": shares}, crossed={"layers": {1: 20}}, dropped=(1,))
    (found,) = meshes(figure)
    assert found.tolist() == [[0.0, 0.4, 0.5], [0.2, 0.6, 1.0]]
    axes = figure.axes[0]
    edges = np.asarray(axes.collections[0].get_coordinates())[0, :, 0]
    assert edges.tolist() == [0, 10, 20, 40]
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[20, 1.5]]]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1 ✕"]
    wide = Shares(iterations=range(1, 1001), rows=[[n / 1000] for n in range(1000)])
    (found,) = meshes(share_maps(INK, shares={"layers": wide}, crossed={}, dropped=()))
    assert found.shape == (1, 192) and found[0, -1] == pytest.approx(0.997, abs=0.003)


def test_a_map_of_gates_sorts_channels_and_outlines_heads() -> None:
    of: dict[str, Tensor] = {
        "D": torch.tensor([0.5, 0.0, 1.0, 0.25]),
        "L": torch.tensor([1.0, 0.0]),
        "K": torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        "F": torch.rand(2, 400, generator=torch.Generator().manual_seed(1)),
    }
    kept = {axis: x > 0.4 for axis, x in of.items()}
    kept["F"][1] = False
    figure = gate_maps(INK, gates=of, kept=kept, dropped=(1,))
    hidden, layers, groups, ffn = meshes(figure)
    assert hidden.tolist() == [[1.0, 0.5, 0.25, 0.0]] and layers.tolist() == [[1.0, 0.0]]
    assert np.array_equal(groups, of["K"].numpy()) and ffn.shape == (2, 192)
    assert bool((np.diff(ffn) <= 0).all())
    by_unit = {axes.get_xlabel().split(",")[0]: axes for axes in figure.axes[:4]}
    assert list(by_unit) == ["hidden channel", "layer", "query group", "FFN channel"]
    (line,) = (c for c in by_unit["FFN channel"].collections if isinstance(c, LineCollection))
    segments = [segment.tolist() for segment in line.get_segments()]
    count = int(kept["F"][0].sum())
    assert segments == [[[count, 0], [count, 1]]]  # none in the layer that goes
    (outline,) = (c for c in by_unit["query group"].collections if isinstance(c, PolyCollection))
    assert len(outline.get_paths()) == 2


def test_gates_of_heads_that_repeat_their_groups_are_left_out(tmp_path: Path) -> None:
    scores = gates(axes="KL")
    repeated = scores.criteria["gates"]["K"].repeat_interleave(SHAPE.heads_per_group, 1)
    for name, heads in (("same", repeated), ("own", repeated * 0.5)):
        of = {"gates": {**scores.criteria["gates"], "Q": heads}}
        folder = write_run(tmp_path / name, told(1))
        write_scores(folder / MASK_SCORES, replace(scores, criteria=of))
        words = {r["axis"] for r in sheet(shown(folder)[0], "gates")}
        assert words == ({"query_groups", "layers"} | ({"heads"} if name == "own" else set()))


def test_a_run_without_rows_of_masks_has_no_words() -> None:
    assert held_words(Run(path=Path("x"), rows=[row(1)])) == []
    assert shares_gone(Run(path=Path("x"), rows=[row(1)])) == {}


def test_the_digest_of_folded_gates_is_told() -> None:
    folded = Run(path=Path("x"), rows=[row(1)], facts={"folding_digest": "f01d" * 16})
    section = command_section({"recovered": folded})
    assert section is not None
    (digests,) = section.parts
    assert isinstance(digests, Table)
    assert ("folding digest", "f01d" * 16) in digests.rows
