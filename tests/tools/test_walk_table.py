from __future__ import annotations

import json
from pathlib import Path

import pytest
from walk_table import row, table


def walked(run: Path, name: str, parameters: int, dtype: str, seconds: dict[str, int]) -> None:
    (run / "report").mkdir(exist_ok=True)
    (run / ".steps").mkdir(exist_ok=True)
    inspected = {"parameters": parameters, "dtype": dtype}
    judged = {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 0.9, "tokens": 800, "windows": 2}
    (run / "report" / f"{name}.inspect.json").write_text(json.dumps(inspected))
    (run / "report" / f"{name}.evaluate.json").write_text(json.dumps(judged))
    for step, spent in seconds.items():
        (run / ".steps" / f"{step}.seconds").write_text(f"{spent}\n")


def test_rows_count_bytes_and_the_seconds_of_their_steps(tmp_path: Path) -> None:
    walked(tmp_path, "source", 1_000_000, "fp32", {"convert": 3})
    walked(tmp_path, "pruned", 500_000, "bf16", {"plan": 2, "prune": 5})
    text = table([row(tmp_path, "source", ["convert"]), row(tmp_path, "pruned", ["plan", "prune"])])
    head, rule, source, pruned = text.splitlines()
    assert len({len(head), len(rule), len(source), len(pruned)}) == 1
    cells = [cell.strip() for cell in pruned.strip("|").split("|")]
    assert cells == ["pruned", "500,000", "50%", "1 MB", "2.500", "12.2", "0.900", "7"]
    assert "4 MB" in source


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"random\.inspect\.json is missing"):
        row(tmp_path, "random", ["baseline"])
