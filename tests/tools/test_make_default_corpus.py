from __future__ import annotations

import json
import sys
from pathlib import Path

import make_default_corpus
import pytest

LONG = "A paragraph that is long enough to be recognised when it is repeated elsewhere."


def test_every_tenth_document_is_held_out() -> None:
    documents = [f"document {number}" for number in range(25)]
    training, held_out = make_default_corpus.split(documents)
    assert held_out == ["document 9", "document 19"]
    assert training == [text for text in documents if text not in held_out]


def test_training_loses_the_paragraphs_of_the_held_out_text() -> None:
    documents = [f"own {number}\n\n{LONG}\n\nshort" for number in range(10)]
    training, held_out = make_default_corpus.split(documents)
    assert LONG in held_out[0]
    assert training[0] == "own 0\n\nshort"


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    command = ["make_default_corpus", "--save", str(tmp_path), "--code-bytes", "300000"]
    monkeypatch.setattr(sys, "argv", command)
    make_default_corpus.main()
    return tmp_path


def test_held_out_text_is_in_no_training_document(corpus: Path) -> None:
    for domain in ("prose", "code"):
        rows = (corpus / f"{domain}.train.jsonl").read_text().splitlines()
        training = "\n\n".join(json.loads(row)["text"] for row in rows)
        held_out = (corpus / f"{domain}.eval.txt").read_text()
        assert len(training) > 5 * len(held_out) > 0
        paragraphs = [part.strip() for part in held_out.split("\n\n") if len(part.strip()) >= 60]
        assert paragraphs
        shared = set(paragraphs) & {part.strip() for part in training.split("\n\n")}
        assert not shared


def test_the_joint_text_has_equal_parts(corpus: Path) -> None:
    prose, code = (corpus / f"{name}.eval.txt" for name in ("prose", "code"))
    shortest = min(len(prose.read_text()), len(code.read_text()))
    joint = (corpus / "eval.txt").read_text()
    assert 2 * shortest - 2000 < len(joint) <= 2 * shortest + 2


def test_the_same_python_writes_the_same_bytes(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {file.name: file.read_bytes() for file in corpus.iterdir()}
    make_default_corpus.main()
    assert {file.name: file.read_bytes() for file in corpus.iterdir()} == first
