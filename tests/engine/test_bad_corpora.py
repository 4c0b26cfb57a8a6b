"""F18: corpora that cannot be trained on are refused, by ``--data-path`` and by ``--domains``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.data.indexed import CorpusWriter
from tests.engine import domain_runs
from tests.engine.domain_runs import prefix, write_recipe
from tests.engine.runs import words
from tests.pico import refused

SUFFIXES = (".bin", ".idx", ".json")


def _write(path: Path, documents: list[list[int]], like: Path | None = None) -> None:
    """A corpus as stock Megatron-LM writes it, without a sidecar; or with another's facts."""
    with CorpusWriter(path, np.dtype(np.uint16)) as writer:
        for ids in documents:
            sizes = np.array([len(ids)] if ids else [], np.int32)
            writer.add(np.array(ids, np.uint16), sizes, np.array([len(sizes)]))
        writer.prepare(json.loads(Path(f"{like}.json").read_text()) if like else {})
        writer.publish()
    if like is None:
        Path(f"{path}.json").unlink()


def _copy(path: Path, good: Path) -> None:
    for suffix in SUFFIXES:
        shutil.copy(f"{good}{suffix}", f"{path}{suffix}")


def _cut(path: Path, good: Path, suffix: str, without: str) -> None:
    _copy(path, good)
    file = Path(f"{path}{suffix}")
    file.write_bytes(file.read_bytes()[:-4])
    Path(f"{path}{without}").unlink(missing_ok=True)


def _mixed(path: Path, good: Path, other: Path, suffix: str) -> None:
    _copy(path, good)
    shutil.copy(f"{other}{suffix}", f"{path}{suffix}")


def _garbage(path: Path, good: Path, suffix: str, size: int) -> None:
    _copy(path, good)
    Path(f"{path}{suffix}").write_bytes(bytes(range(size)))


def _remove(path: Path, good: Path, suffix: str) -> None:
    _copy(path, good)
    Path(f"{path}{suffix}").unlink()


Made = Callable[[Path, Path, Path], None]
# name -> how it is made from two good corpora, exit code, what is said
CASES: dict[str, tuple[Made, int, str]] = {
    "no documents": (lambda at, good, other: _write(at, []), 2, "an empty corpus, 0 documents"),
    "documents without tokens": (
        lambda at, good, other: _write(at, [[], [], []]), 2, "an empty corpus, 3 documents"
    ),
    "one short document": (
        lambda at, good, other: _write(at, [[5, 6, 7]]), 2, "one sample takes 33"
    ),
    "one long document": (  # all of it goes to one part
        lambda at, good, other: _write(at, [list(range(300))]), 2, "0 documents of 0 tokens"
    ),
    "many short documents": (
        lambda at, good, other: _write(at, [[4, 5, 1]] * 10), 2, "one sample takes 33"
    ),
    "all tokens unknown": (
        lambda at, good, other: _write(at, [[0] * 40] * 20), 2, "all have the id 0"
    ),
    "all tokens unknown, documents ended": (
        lambda at, good, other: _write(at, [[*[7] * 40, 1]] * 20, good), 2, "all have the id 7"
    ),
    "empty .bin": (lambda at, good, other: _garbage(at, good, ".bin", 0), 3, ".bin: 0 bytes"),
    "empty .idx": (lambda at, good, other: _garbage(at, good, ".idx", 0), 3, "not a Megatron"),
    "garbage .idx": (lambda at, good, other: _garbage(at, good, ".idx", 99), 3, "not a Megatron"),
    "cut .bin": (lambda at, good, other: _cut(at, good, ".bin", ".json"), 3, "idx tells of"),
    "cut .idx": (lambda at, good, other: _cut(at, good, ".idx", ".json"), 3, "bytes, wanted"),
    "other .bin": (lambda at, good, other: _mixed(at, good, other, ".bin"), 3, "idx tells of"),
    "other .idx": (lambda at, good, other: _mixed(at, good, other, ".idx"), 3, "idx tells of"),
    "other .json": (lambda at, good, other: _mixed(at, good, other, ".json"), 3, "two corpora"),
    "no .idx": (lambda at, good, other: _remove(at, good, ".idx"), 3, "a .bin but no .idx"),
    "no .bin": (lambda at, good, other: _remove(at, good, ".bin"), 3, "a .idx but no .bin"),
    "none": (lambda at, good, other: None, 2, "no corpus at"),
}  # fmt: skip


@pytest.fixture
def bad(tmp_path: Path, corpora: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        made = CASES[name][0]
        made(tmp_path / "bad", Path(prefix(corpora, "mixed_1")), Path(prefix(corpora, "easy")))
        return tmp_path / "bad"

    return make


@pytest.mark.parametrize("name", CASES)
def test_such_a_corpus_is_refused(
    tmp_path: Path, reference: Path, bad: Callable[[str], Path], name: str
) -> None:
    _, code, says = CASES[name]
    command = words(reference / "gqa", tmp_path / "run", bad(name))
    assert "bad" in refused(*command, says=says, code=code)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["prefixes", "validation"])
@pytest.mark.parametrize("name", CASES)
def test_such_a_corpus_is_refused_in_a_domain(
    tmp_path: Path, reference: Path, corpora: Path, bad: Callable[[str], Path], name: str, part: str
) -> None:
    """Among good ones, to train on or to measure with."""
    _, code, says = CASES[name]
    if part == "validation" and name == "one long document":
        pytest.skip("a corpus of its own is validation as a whole")
    domains = domain_runs.domain_rows(corpora)
    domains[1][part] = [prefix(corpora, "mixed_2"), str(bad(name))]
    recipe = write_recipe(tmp_path / "r.yaml", domains)
    command = domain_runs.words(reference / "gqa", tmp_path / "run", recipe)
    assert "bad" in refused(*command, says=says, code=code)
    assert not (tmp_path / "run").exists()
