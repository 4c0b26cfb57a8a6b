"""A run keeps what was asked of it, start by start."""

from __future__ import annotations

import json
from pathlib import Path

from tests.engine.runs import words
from tests.pico import ok
from tests.report.test_page import Reader


def test_every_start_is_recorded_with_its_iteration_and_shown(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    save, page = tmp_path / "run", tmp_path / "page.html"
    first = words(reference / "gqa", save, corpus, "--exit-interval", 3)
    again = words(reference / "gqa", save, corpus)
    ok(*first)
    ok(*again)
    rows = [json.loads(line) for line in (save / "commands.jsonl").read_text().splitlines()]
    assert [(row["iteration"], row["argv"]) for row in rows] == [(0, first), (3, again)]
    assert {row["processes"] for row in rows} == {1}
    ok("report", save, "--save", page)
    reader = Reader(page.read_text())
    assert [row[1] for row in reader.tables["What was started"][1:]] == ["0", "3"]
    told = {row[0]: row[1] for row in reader.tables["Digests"]}
    assert told["checkpoint"] == "iter_0000006" and len(told["manifest.json SHA-256"]) == 64
