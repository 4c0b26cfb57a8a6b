"""A run keeps what was asked of it, start by start."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tests.engine.runs import words
from tests.pico import ok, refused
from tests.report.test_page import Reader
from tests.sparse import make_sparse

TP3 = ("--tensor-model-parallel-size", 3)


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


def test_the_commands_travel_with_the_model_into_its_card(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    plan = ("--ffn-hidden-size-remain", 60)
    ok("prune", "--load", reference / "gqa", "--save", tmp_path / "pruned", "--to", "hf", *plan)
    first = words(tmp_path / "pruned", tmp_path / "run", corpus, "--exit-interval", 3)
    again = words(tmp_path / "pruned", tmp_path / "run", corpus)
    ok(*first)
    ok("convert", "--load", tmp_path / "run", "--save", tmp_path / "half", "--to", "hf")
    ok(*again)
    ok("convert", "--load", tmp_path / "run", "--save", tmp_path / "hf", "--to", "hf")
    ok("reshard", "--load", tmp_path / "run", "--save", tmp_path / "tp3", *TP3)
    ok("convert", "--load", tmp_path / "tp3", "--save", tmp_path / "again", "--to", "hf")
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("half", "hf", "again")}
    assert shlex.join(["megatron-prune", *first]) in cards["half"]
    assert cards["half"].count("megatron-prune train") == 1
    assert shlex.join(["megatron-prune", *again]) in cards["hf"]
    assert cards["hf"].count("megatron-prune train") == 2
    assert "From iteration 3 on, 1 processes" in cards["hf"]
    assert "| ffn_hidden_size | 96 | 60 |" in cards["hf"]
    assert cards["again"] == cards["hf"]
    third = words(tmp_path / "hf", tmp_path / "more", corpus, "--train-iters", 3, "--finetune")
    ok(*third)
    ok("convert", "--load", tmp_path / "more", "--save", tmp_path / "last", "--to", "hf")
    assert (tmp_path / "last" / "README.md").read_text().count("megatron-prune train") == 3


def test_the_record_of_zeros_travels_through_training_which_verify_tells_from_damage(
    reference: Path, corpus: Path, tmp_path: Path
) -> None:
    make_sparse(reference / "gqa", tmp_path / "sparse")
    more = ("--train-iters", 3, "--eval-iters", 0)
    ok(*words(tmp_path / "sparse", tmp_path / "run", corpus, *more))
    ok("convert", "--load", tmp_path / "run", "--save", tmp_path / "hf", "--to", "hf")
    record = (tmp_path / "sparse/sparsity.json").read_bytes()
    for folder in (tmp_path / "run", tmp_path / "hf"):
        assert [path.read_bytes() for path in folder.rglob("sparsity.json")] == [record]
        given = ("--load", folder, "--source", reference / "gqa")
        refused("verify", *given, says="was trained since it was made sparse, and training changed")
    assert "zeros only where it ran with `--keep-zeros`" in (tmp_path / "hf/README.md").read_text()
    ok("verify", "--load", tmp_path / "sparse", "--source", reference / "gqa")
