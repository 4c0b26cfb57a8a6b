from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_prune.errors import ConfigError
from megatron_prune.report.loss_curves import (
    LossCurve,
    plot_loss_curves,
    read_loss_curve,
    smoothed,
)


def metrics(path: Path, *rows: object, tail: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_reads_training_and_validation_by_iteration(tmp_path: Path) -> None:
    path = metrics(
        tmp_path / "metrics.jsonl",
        {"iteration": 2, "lm loss": 3.0, "learning-rate": 1e-4},
        {"iteration": 1, "lm loss": 4.0},
        {"iteration": 2, "validation loss": 3.5},
    )
    curve = read_loss_curve(path)
    assert curve == LossCurve(training=[(1, 4.0), (2, 3.0)], validation=[(2, 3.5)])


def test_half_a_line_at_the_end_is_passed_over(tmp_path: Path) -> None:
    path = metrics(tmp_path / "m.jsonl", {"iteration": 1, "lm loss": 4.0}, tail='{"iterat')
    assert read_loss_curve(path).training == [(1, 4.0)]


def test_half_a_line_in_the_middle_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"iteration": 1, "lm loss": 4.0}\n{"iterat\n{"iteration": 3, "lm loss": 4.0}\n'
    )
    with pytest.raises(ConfigError, match="m.jsonl, line 2: wanted a JSON object"):
        read_loss_curve(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "wanted the metrics.jsonl of a run"), ("", "0 lines and no 'lm loss'")],
)
def test_no_losses_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "m.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_loss_curve(path)


def test_smoothed_is_the_mean_of_the_last_values() -> None:
    assert smoothed([4.0, 2.0, 6.0], 2) == [4.0, 3.0, 4.0]


def test_writes_a_png_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    curve = LossCurve(training=[(1, 4.0), (2, float("nan")), (3, 3.0)], validation=[(3, 3.2)])
    only_validation = LossCurve(training=[], validation=[(3, 5.0)])
    save = tmp_path / "new" / "curves.png"
    plot_loss_curves({"a": curve, "b": only_validation}, save, title="two runs")
    assert save.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in save.parent.iterdir()] == ["curves.png"]
