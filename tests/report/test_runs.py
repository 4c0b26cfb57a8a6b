"""Training runs and judged models on the page: the numbers of their files, and what they lack."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import ConfigError
from megatron_prune.report.run_pictures import COLORS, smoothed
from megatron_prune.report.runs import read_rows, read_run, thinned
from tests.pico import ok, refused
from tests.report.test_page import CHROMIUM, Reader


def row(n: int, **more: Any) -> dict[str, Any]:
    values = {"iteration": n, "lm loss": 4.0 / n, "learning-rate": 1e-3 / n, "grad-norm": 1.0 + n}
    return values | {"consumed-tokens": 256 * n, "tokens-per-second": 100.0 * n} | more


def write_run(folder: Path, *rows: dict[str, Any], tail: str = "") -> Path:
    folder.mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def domains(n: int) -> dict[str, float]:
    return {
        "domain loss/web": 3.0 / n, "domain loss/code": 5.0 / n,
        "domain weight/web": 0.5 + n / 100, "domain weight/code": 0.5 - n / 100,
    }  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    validation = {"iteration": 3, "validation loss": 1.5, "validation ppl": 4.48}
    plain = [row(n) for n in (1, 2, 3)]
    full = [row(n, **domains(n)) for n in range(1, 21)]
    return {
        "plain": write_run(tmp_path / "a" / "run", *plain, validation, tail='{"iter'),
        "full": write_run(tmp_path / "b" / "run", *full),
    }


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_validation_stands_at_its_iteration_s_tokens(runs: dict[str, Path]) -> None:
    run = read_run(runs["plain"])
    assert run.points("validation loss", over_tokens=True) == [(768.0, 1.5)]
    assert run.points("lm loss", over_tokens=False) == [(1, 4.0), (2, 2.0), (3, 4.0 / 3)]
    assert run.middle("tokens-per-second") == 200.0


def test_what_is_missing_is_named(runs: dict[str, Path], tmp_path: Path) -> None:
    named = ["loss of a domain", "weight of a domain", "tokens of a domain"]
    assert read_run(runs["plain"]).missing == named
    assert read_run(runs["full"]).missing == ["validation loss", "tokens of a domain"]
    bare = write_run(tmp_path / "bare", {"iteration": 1, "lm loss": 2.0, "grad-norm": None})
    assert read_run(bare).missing[1:5] == ["tokens", "learning rate", "gradient norm", "tokens/s"]


def test_thinned_points_keep_the_last() -> None:
    points = [(float(n), 0.0) for n in range(1001)]
    kept = thinned(points, 100)
    assert len(kept) <= 100 and kept[-1] == points[-1] and set(kept) <= set(points)
    assert thinned(points[:5], 100) == points[:5]


def test_the_page_shows_runs_with_their_numbers_beside_it(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    command = {"iteration": 0, "processes": 3, "argv": ["train", "--data-path", "a b"]}
    (runs["full"] / "commands.jsonl").write_text(json.dumps(command) + "\n{")
    where = ("--png-dir", tmp_path / "png", "--csv-dir", tmp_path / "csv")
    page = tmp_path / "page.html"
    given = [f"{name}={folder}" for name, folder in runs.items()]
    ok("report", *given, "--save", page, *where)
    reader = Reader(page.read_text())
    assert list(reader.texts)[1:6] == ["training-loss", "course", "domains", "files", "again"]
    told = {row[0]: row[1:] for row in reader.tables["Runs"][1:]}
    assert told["plain"][:5] == ["3", "768", "1.3333", "1.5000", "200"]
    assert told["full"][:5] == ["20", "5,120", "0.2000", "-", "1,050"]
    assert "plain's metrics have no loss of a domain, no weight" in reader.texts["domains"]
    assert reader.tables["What was started"][1] == [
        "full", "0", "torchrun (3 processes) -m megatron_prune train --data-path 'a b'",
    ]  # fmt: skip
    assert "No commands are recorded for plain." in reader.texts["again"]
    assert {p.name for p in (tmp_path / "png").iterdir()} == {
        "loss.png", "course.png", "domains-full.png",
    }  # fmt: skip
    assert {p.name for p in (tmp_path / "csv").iterdir()} == {"training.csv", "domains.csv"}
    rows = read_csv(tmp_path / "csv" / "training.csv")
    assert [r["lm loss"] for r in rows if r["run"] == "plain"] == ["4.0", "2.0", repr(4.0 / 3)]
    rows = read_csv(tmp_path / "csv" / "domains.csv")
    assert len(rows) == 40 and {r["run"] for r in rows} == {"full"}
    assert float(rows[-1]["weight"]) == pytest.approx(0.3) and rows[-1]["domain"] == "code"


def test_one_run_without_tokens_puts_all_over_iterations(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    bare = write_run(tmp_path / "bare", {"iteration": 1, "lm loss": 2.0})
    page = tmp_path / "page.html"
    ok("report", runs["plain"], bare, "--save", page)
    text = page.read_text()
    assert "Over iterations: not every run says how many tokens" in text
    assert "Loss over iteration:" in text and "Loss over tokens" not in text


def test_before_and_after_are_the_numbers_of_evaluate(models, tmp_path: Path) -> None:
    plan, pruned = tmp_path / "plan.json", tmp_path / "pruned"
    ok("plan", "--load", models("gqa"), "--save", plan, "--ffn-hidden-size-remain", 60)
    ok("prune", "--load", models("gqa"), "--save", pruned, "--plan", plan, "--to", "hf")
    (tmp_path / "text").write_text("The quick brown fox jumps. " * 30)
    flags = ("--data", tmp_path / "text", "--seq-length", 32, "--max-windows", 2)
    for name, load in (("dense", models("gqa")), ("pruned-model", pruned)):
        ok("evaluate", "--load", load, *flags, "--json", tmp_path / f"{name}.json")
    page, csvs = tmp_path / "page.html", tmp_path / "csv"
    files = (tmp_path / "dense.json", f"after={tmp_path / 'pruned-model.json'}", plan)
    ok("report", *files, "--save", page, "--csv-dir", csvs)
    reader = Reader(page.read_text())
    (caption,) = (name for name in reader.tables if name.startswith("Held-out text"))
    before, after = reader.tables[caption][1:]
    facts = json.loads((pruned / "manifest.json").read_text())
    assert (after[0], after[1]) == ("after", f"{facts['parameters']:,}")
    wanted = json.loads((tmp_path / "dense.json").read_text())
    assert before[2:5] == ["100.0%", f"{wanted['loss']:.4f}", "-"]
    measured = json.loads((tmp_path / "pruned-model.json").read_text())["loss"]
    assert after[4] == f"{measured - wanted['loss']:+.4f}"
    said = (
        f"dense.json {wanted['loss']:.3f}, after {measured:.3f} ({measured - wanted['loss']:+.3f})"
    )
    assert said in reader.texts["result"]
    assert after[2] == f"{facts['parameters'] / wanted['parameters']:.1%}"
    assert float(read_csv(csvs / "judged.csv")[0]["loss"]) == wanted["loss"]


def test_what_training_won_back_is_told_of_one_text_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for data, says in (
        ("text", "Of what cut lost, back has won back 75%."),
        ("other", "different"),
    ):
        for name, loss in (("dense", 2.0), ("cut", 4.0), ("back", 2.5)):
            values = {"loss": loss, "perplexity": 1, "bits_per_byte": 1, "load": name}
            values["data"] = data if name == "back" else "text"
            (tmp_path / f"{name}.json").write_text(json.dumps(values))
        files = [f"{name}={tmp_path / name}.json" for name in ("dense", "cut", "back")]
        ok("report", *files, "--save", page, "--overwrite")
        assert says in Reader(page.read_text()).texts["result"]
    assert "won back" not in page.read_text()


def test_smoothed_is_the_mean_of_the_last_values() -> None:
    assert smoothed([4.0, 2.0, 6.0], 2) == [4.0, 3.0, 4.0]


def test_half_a_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"iteration": 1, "lm loss": 4.0}\n{"iterat\n{"iteration": 3, "lm loss": 4.0}\n'
    )
    with pytest.raises(ConfigError, match="m.jsonl, line 2: wanted a JSON object"):
        read_rows(path)
    with pytest.raises(ConfigError, match="wanted the metrics.jsonl of a run"):
        read_rows(tmp_path / "nowhere.jsonl")


def test_rows_are_sorted_and_those_of_one_iteration_joined(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = ({"iteration": 2, "lm loss": 3.0}, {"iteration": 1, "lm loss": 4.0})
    rows += ({"iteration": 2, "validation loss": 3.5},)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iterat')
    assert read_rows(path) == [rows[1], rows[0] | rows[2]]


def test_task_results_stand_side_by_side(tmp_path: Path) -> None:
    values = {"alias": "t", "acc,none": 0.5, "acc_stderr,none": 0.25, "n,none": "N/A"}
    (tmp_path / "a.json").write_text(json.dumps({"load": "x", "results": {"t": values}}))
    other = {"acc,none": 0.75, "exact_match,strict": 1}
    (tmp_path / "b.json").write_text(json.dumps({"load": "y", "results": {"t": other}}))
    ok("report", tmp_path / "a.json", tmp_path / "b.json", "--save", tmp_path / "page.html")
    reader = Reader((tmp_path / "page.html").read_text())
    rows = reader.tables["lm-evaluation-harness: score ± standard error"]
    assert rows[1:] == [
        ["t, acc", "0.5000 ± 0.2500", "0.7500"], ["t, exact_match (strict)", "-", "1.0000"],
    ]  # fmt: skip


def test_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    save = ("--save", tmp_path / "page.html")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("")
    refused("report", empty, *save, says="0 lines and no 'lm loss' among them; has it run?")
    refused("report", f"x={runs['plain']}", f"x={runs['full']}", *save, says="x: stands twice")
    refused("report", "x=/nowhere", *save, says="/nowhere: is not there; wanted scores")
    file = runs["plain"] / "metrics.jsonl"
    refused("report", file, *save, "--csv-dir", file, says="--csv-dir")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
@pytest.mark.parametrize("is_dark", [False, True])
def test_a_browser_draws_every_run_s_line(
    runs: dict[str, Path], tmp_path: Path, is_dark: bool
) -> None:
    from PIL import Image, ImageColor

    page, shot = tmp_path / "page.html", tmp_path / "shot.png"
    given = [f"{name}={folder}" for name, folder in runs.items()]
    ok("report", *given, f"third={shutil.copytree(runs['full'], tmp_path / 'c')}", "--save", page)
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
        f"--window-size=1100,3500 --blink-settings=preferredColorScheme={0 if is_dark else 1}"
    )
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    colors = {color: count for count, color in Image.open(shot).convert("RGB").getcolors(1 << 24)}
    paper = (13, 17, 23) if is_dark else (255, 255, 255)
    assert max(colors, key=lambda color: colors[color]) == paper
    for number in (0, 1, 2):
        assert colors.get(ImageColor.getrgb(COLORS[number]), 0) > 20, COLORS[number]
    assert ImageColor.getrgb(COLORS[3]) not in colors, "there is no fourth line"
    assert math.isclose(sum(colors.values()), 1100 * 3500)
