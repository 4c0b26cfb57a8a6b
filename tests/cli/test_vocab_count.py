"""``megatron-prune vocab count`` from outside: what it writes, says and refuses."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from emb_pruner.counts import load_counts
from megatron_prune.data.tokenizers import load_tokenizer
from tests import launch, pico
from tests.data.conftest import write_bpe

TEXT = "the quick brown fox jumps over the lazy dog.\n\n  And again:\n" * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe"), TEXT, vocab_size=400)


@pytest.fixture()
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(TEXT)
    return tmp_path / "a.txt"


def run(*args: object) -> subprocess.CompletedProcess[str]:
    return launch.fork_and_wait(launch.PROGRAM, "vocab", "count", *args)


def refused(said: str, *args: object) -> None:
    pico.refused("vocab", "count", *args, says=said)


def test_count_then_merge(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "b.jsonl"
    lines.write_text("".join(json.dumps({"body": t}) + "\n" for t in TEXT.splitlines()))
    first, second, both = (tmp_path / f"{name}.npz" for name in "abc")
    done = run("--tokenizer", tokenizer, "--input", text, "--save", first)
    assert done.returncode == 0, done.stderr
    ids = load_tokenizer(tokenizer).encode(TEXT, False)
    assert done.stdout.startswith(
        f"{first}: 1 documents, {len(TEXT)} bytes of text, {len(ids)} tokens, {len(set(ids))} of "
    )
    assert "count: 100%" in done.stderr
    counts = load_counts(first, load_tokenizer(tokenizer).digest)
    assert (counts.counts_V == np.bincount(ids, minlength=counts.counts_V.size)).all()
    more = ("--json-key", "body", "--workers", 2)
    done = run("--tokenizer", tokenizer, "--input", lines, "--save", second, *more)
    assert done.returncode == 0, done.stderr
    assert run("--merge", first, second, "--save", both).returncode == 0
    total = load_counts(both)
    assert (total.counts_V == counts.counts_V + load_counts(second).counts_V).all()
    assert total.documents == 1 + len(TEXT.splitlines())


def test_what_cannot_be_is_refused(tokenizer: Path, text: Path, tmp_path: Path) -> None:
    new, there = tmp_path / "new.npz", tmp_path / "there.npz"
    there.write_bytes(b"kept")
    refused("--tokenizer PATH is missing", "--input", text, "--save", new)
    refused("--input and --merge: give one of", "--merge", there, "--input", text, "--save", new)
    refused("exists; remove it", "--tokenizer", tokenizer, "--input", text, "--save", there)
    inside = tokenizer / "counts.npz"
    refused("inputs; they never", "--tokenizer", tokenizer, "--input", text, "--save", inside)
    refused("no such file", "--tokenizer", tmp_path / "x", "--input", text, "--save", new)
    wordpiece = {"model": {"type": "WordPiece", "vocab": {"a": 0}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(wordpiece))
    named = ("--tokenizer", tmp_path / "tokenizer.json")
    refused("its model is WordPiece", *named, "--input", text, "--save", new)
    (tmp_path / "empty.txt").touch()
    empty = ("--input", tmp_path / "empty.txt")
    refused("empty corpus", "--tokenizer", tokenizer, *empty, "--save", new)
    assert there.read_bytes() == b"kept" and not new.exists() and not inside.exists()


def test_counts_of_another_tokenizer_are_refused(
    tokenizer: Path, text: Path, tmp_path: Path
) -> None:
    other = write_bpe(tmp_path / "other", TEXT[::-1], vocab_size=400)
    for folder, name in ((tokenizer, "a.npz"), (other, "b.npz")):
        assert (
            run("--tokenizer", folder, "--input", text, "--save", tmp_path / name).returncode == 0
        )
    merge = ("--merge", tmp_path / "a.npz", tmp_path / "b.npz", "--save", tmp_path / "c.npz")
    refused("b.npz: counts of another tokenizer", *merge)
    refused(
        "a.npz: counts of another tokenizer",
        *("--tokenizer", other, "--merge", tmp_path / "a.npz", "--save", tmp_path / "c.npz"),
    )
    assert not (tmp_path / "c.npz").exists()
