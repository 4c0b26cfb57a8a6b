"""Zeros on the page: what records and `evaluate` say of them, and which directories carry one."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune.report.sparsity_pictures import Panel, Point, cost_picture, matrix_maps
from tests.pico import TEXT, ok, refused, tensors
from tests.report.test_page import Reader
from tests.report.test_pictures import INK, meshes
from tests.report.test_runs import row, write_run
from tests.sparse import make_sparse

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def sparse(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of gqa's linears but ``linear_proj``; energies 0.9, 0.89, ..."""
    path = tmp_path_factory.mktemp("sparse") / "half"
    make_sparse(models("gqa"), path, pattern=None, wanted=lambda name: "proj" not in name)
    return path


def sheet(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def judged(path: Path, perplexity: float, **more: Any) -> Path:
    values = {
        "loss": math.log(perplexity), "perplexity": perplexity, "bits_per_byte": 1.0, "tokens": 62,
        "load": "/m", "data": "t.txt", "seq_length": 32, "windows": 2, "dtype": "fp32",
    }  # fmt: skip
    path.write_text(json.dumps(values | more))
    return path


def test_a_sparse_model_is_shown_by_its_directory_or_its_record(
    sparse: Path, tmp_path: Path
) -> None:
    ok("convert", "--load", sparse, "--save", tmp_path / "shards", "--to", "megatron")
    given = (f"half={sparse}", tmp_path / "shards", f"file={sparse / 'sparsity.json'}")
    page, beside = tmp_path / "page.html", ("--png-dir", tmp_path / "png")
    ok("report", *given, "--save", page, *beside)
    reader = Reader(page.read_text())
    assert list(reader.texts)[1:] == ["sparsity", "files"]
    text = reader.texts["sparsity"]
    for label in ("half", "shards", "file"):
        assert f"{label}: wanda; 50.00% of the weights of 24 matrices were set to zero." in text
        assert (tmp_path / f"png/sparsity-{label}.png").is_file()
    assert "as large as those of the dense model, and it runs no faster" in text
    told = {row[0]: row[1:] for row in reader.tables["How the zeros were made"]}
    source = json.loads((sparse / "sparsity.json").read_text())["source_digest"]
    assert told["model that was pruned"] == [source] * 3 and told["tokens"] == ["1024"] * 3
    means = reader.tables["Mean over layers (smallest to largest)"]
    # 0.9 less 0.01 times 0, 6, 5, 4: six matrices a layer, energies in a cycle of seven
    assert ["half, linear_q", "4", "0.5000", "0.8625 (0.8400 to 0.9000)", "0.1000"] in means
    rows = sheet(tmp_path / "png", "sparsity")
    assert (
        len(rows) == 72 and rows[0]["matrix"] == "decoder.layers.0.self_attention.linear_q.weight"
    )
    assert [float(x["energy"]) for x in rows[:8]] == [
        0.9, 0.89, 0.88, 0.87, 0.86, 0.85, 0.84, 0.9,
    ]  # fmt: skip
    kinds = {row[1] for row in next(t for c, t in reader.tables.items() if "Files" in c)[1:]}
    assert kinds == {"record of zeros"}


def test_a_run_may_carry_a_record_too(sparse: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", row(1), row(2))
    ok("report", run, "--save", tmp_path / "dense.html")
    assert "sparsity" not in Reader((tmp_path / "dense.html").read_text()).texts
    ok("convert", "--load", sparse, "--save", tmp_path / "m", "--to", "megatron")
    for path in (tmp_path / "m").iterdir():
        path.rename(run / path.name)
    ok("report", run, "--save", tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text())
    assert {"training-loss", "sparsity"} <= set(reader.texts)
    files = [row[:2] for row in next(t for c, t in reader.tables.items() if "Files" in c)[1:]]
    assert files == [["run", "record of zeros"], ["run", "training run"]]


def test_what_evaluate_counts_is_drawn(sparse: Path, models: Models, tmp_path: Path) -> None:
    """Of the weights as they are: one that training has brought back is no zero any more."""
    (tmp_path / "text").write_text(TEXT * 20)
    flags = ("--data", tmp_path / "text", "--seq-length", 32, "--max-windows", 2)
    for name, load in (("dense", models("gqa")), ("half", sparse)):
        out = ok("evaluate", "--load", load, *flags, "--json", tmp_path / f"{name}.json").out
        assert ("sparsity       0.500000 (wanda)" in out) == (name == "half")
    found = json.loads((tmp_path / "half.json").read_text())
    assert (found["sparsity"], found["sparsity_method"], found["sparsity_pattern"]) == (
        0.5, "wanda", None,
    )  # fmt: skip
    assert "sparsity" not in json.loads((tmp_path / "dense.json").read_text())
    files = (tmp_path / "dense.json", tmp_path / "half.json")
    ok("report", *files, "--save", tmp_path / "p.html", "--csv-dir", tmp_path / "csv")
    reader = Reader((tmp_path / "p.html").read_text())
    assert "Perplexity against the share of zeros" in reader.texts["sparsity"]
    table = next(t for c, t in reader.tables.items() if c.startswith("Held-out text"))
    assert table[0][-2] == "zeros" and [row[-2] for row in table[1:]] == ["-", "50.00%"]
    points = [(x["model"], x["sparsity"]) for x in sheet(tmp_path / "csv", "sparsity-perplexity")]
    assert points == [("dense.json", "0.0"), ("half.json", "0.5")]


def test_evaluate_counts_what_is_there_and_not_what_is_recorded(
    sparse: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    ok("convert", "--load", sparse, "--save", tmp_path / "m", "--to", "hf")
    (tmp_path / "m/manifest.json").unlink()
    found = tensors(tmp_path / "m")
    up = found["model.layers.0.mlp.up_proj.weight"]
    up[up == 0] = 0.01
    save_file(found, tmp_path / "m/model.safetensors", {"format": "pt"})
    (tmp_path / "text").write_text(TEXT * 20)
    flags = ("--data", tmp_path / "text", "--seq-length", 32, "--max-windows", 1)
    ok("evaluate", "--load", tmp_path / "m", *flags, "--json", tmp_path / "m.json")
    linears = [x for name, x in found.items() if "_proj." in name and "o_proj" not in name]
    share = sum(int((x == 0).sum()) for x in linears) / sum(x.numel() for x in linears)
    assert json.loads((tmp_path / "m.json").read_text())["sparsity"] == share < 0.5


def test_models_that_were_judged_differently_stand_apart(tmp_path: Path) -> None:
    dense, half = judged(tmp_path / "dense", 9.0), {"sparsity": 0.5, "sparsity_method": "wanda"}
    alike = judged(tmp_path / "alike", 12.0, **half)
    longer = judged(tmp_path / "longer", 11.0, seq_length=64, **half)
    ok("report", dense, longer, "--save", tmp_path / "apart.html")
    assert "sparsity" not in Reader((tmp_path / "apart.html").read_text()).texts
    ok("report", dense, longer, alike, "--save", tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    assert "t.txt: 2 windows of 32 tokens, fp32" in text and "of 64 tokens" not in text
    ok("report", dense, "--save", tmp_path / "dense.html")
    assert "sparsity" not in Reader((tmp_path / "dense.html").read_text()).texts


def test_a_damaged_record_is_refused(sparse: Path, tmp_path: Path) -> None:
    values = json.loads((sparse / "sparsity.json").read_text())
    (tmp_path / "x.json").write_text(json.dumps(values | {"reached": "half"}))
    given = (tmp_path / "x.json", "--save", tmp_path / "p.html")
    refused("report", *given, says="reached is 'half'; wanted a share", code=3)


def test_maps_show_the_values_and_leave_dense_matrices_empty() -> None:
    rows = [[0.5, 0.25], [float("nan"), 0.75]]
    maps = {"share of zeros": rows, "energy": [[0.5, 0.5], [0.5, 0.5]]}
    figure = matrix_maps(INK, maps=maps, layers=[0, 3], kinds=["linear_q", "linear_up"])
    zeros, energy = (mesh for mesh in meshes(figure) if mesh.shape == (2, 2))
    assert np.array_equal(zeros, np.array(rows), equal_nan=True) and (energy == 0.5).all()
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "3"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["q", "up"]
    assert [text.get_text() for text in axes.texts] == [".50", ".25", ".75"]


def test_the_cost_is_drawn_by_method_and_pattern() -> None:
    def point(series: str, sparsity: float, perplexity: float, pattern: str = "") -> Point:
        return Point(
            label=f"m{perplexity}", series=series, sparsity=sparsity, perplexity=perplexity,
            pattern=pattern,
        )  # fmt: skip

    points = (
        point("", 0, 10), point("wanda", 0.7, 200), point("wanda", 0.5, 20),
        point("wanda", 0.5, 40, "2:4"), point("alps", 0.5, 30, "2:4"),
        point("alps", 0.5, 25, "2:4"),
    )  # fmt: skip
    (axes,) = cost_picture(INK, panels=[Panel(title="t", points=points)]).axes
    drawn = [(x.get_label(), list(x.get_xdata()), list(x.get_ydata())) for x in axes.lines]
    assert ("wanda", [0.5, 0.7], [20, 200]) in drawn and ("alps", [0.5], [30]) in drawn
    assert drawn[0][2] == [10, 10] and axes.get_yscale() == "log"
    said = [text.get_text() for text in axes.texts]
    assert "2:4" in said and {"2:4 m30", "2:4 m25", "m10"} <= set(said)
