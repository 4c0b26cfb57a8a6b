from __future__ import annotations

import errno
import json
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_prune import files
from megatron_prune.data import indexed
from megatron_prune.data.indexed import (
    SUFFIXES,
    CorpusWriter,
    corpus_path,
    finish_interrupted,
    token_dtype,
)
from megatron_prune.data.sidecar import check_corpus
from megatron_prune.errors import ConfigError, DamagedError, StorageError
from megatron_prune.files import hash_file

FACTS = {"version": 1, "vocab_size": 65000, "tokenizer_digest": "d", "eod": 1}
Document = list[list[int]]  # sequences of ids


def write(prefix: Path, documents: list[Document], dtype: Any = np.uint16, **kw: Any) -> None:
    with CorpusWriter(prefix, np.dtype(dtype), **kw) as writer:
        for start in range(0, len(documents), 3):
            part = documents[start : start + 3]
            sequences = [sequence for document in part for sequence in document]
            writer.add(
                np.array([i for sequence in sequences for i in sequence], dtype=dtype),
                np.array([len(sequence) for sequence in sequences], dtype=np.int32),
                np.array([len(document) for document in part], dtype=np.int64),
            )
        writer.prepare(FACTS)
        writer.publish()


def parse(prefix: Path) -> list[Document]:
    """Documents of a corpus, by the format's description alone."""
    raw, data = (corpus_path(prefix, s).read_bytes() for s in (".idx", ".bin"))
    magic, version, code, sequences, ends = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version) == (b"MMIDIDX\x00\x00", 1)
    letter, size = {4: ("i", 4), 8: ("H", 2)}[code]
    lengths = struct.unpack_from(f"<{sequences}i", raw, 34)
    offsets = struct.unpack_from(f"<{sequences}q", raw, 34 + 4 * sequences)
    firsts = struct.unpack_from(f"<{ends}q", raw, 34 + 12 * sequences)
    assert len(raw) == 34 + 12 * sequences + 8 * ends
    assert len(data) == size * sum(lengths)
    read = [
        list(struct.unpack_from(f"<{n}{letter}", data, at))
        for n, at in zip(lengths, offsets, strict=True)
    ]
    return [read[a:b] for a, b in pairwise(firsts)]


DOCUMENTS: list[Document] = [
    [[1, 2, 3]],
    [],
    [[4], [5, 6], [7]],
    [[40000, 9]],
    *[[[i, i + 1]] * (i % 4) for i in range(20)],
]
OTHERS: list[Document] = [[[8, 8]], [[9]]]


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("piece", [1, 4, 1 << 17])
def test_files_are_those_of_megatron_s_builder(
    tmp_path: Path, megatron: Any, dtype: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "_PIECE", piece)
    write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        flat = [i for sequence in document for i in sequence]
        builder.add_document(flat, [len(sequence) for sequence in document])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (
            tmp_path / f"theirs{suffix}"
        ).read_bytes()


def test_megatron_and_a_plain_parser_read_back_what_was_written(
    tmp_path: Path, megatron: Any
) -> None:
    write(tmp_path / "c", DOCUMENTS)
    assert parse(tmp_path / "c") == DOCUMENTS
    dataset = megatron.IndexedDataset(str(tmp_path / "c"))
    assert [list(x) for x in dataset[:]] == [s for document in DOCUMENTS for s in document]
    assert dataset.document_indices[-1] == len(dataset)


@pytest.mark.parametrize("size", [2, 65499, 65500, 200000])
def test_the_type_of_ids_is_megatron_s(megatron: Any, size: int) -> None:
    assert token_dtype(size) == np.dtype(megatron.DType.optimal_dtype(size))


def test_the_sidecar_tells_counts_and_hashes(tmp_path: Path) -> None:
    write(tmp_path / "c", DOCUMENTS)
    sidecar = json.loads((tmp_path / "c.json").read_text())
    assert sidecar["documents"] == len(DOCUMENTS)
    assert sidecar["tokens"] == sum(len(s) for document in DOCUMENTS for s in document)
    assert (sidecar["max_token_id"], sidecar["dtype"]) == (40000, "uint16")
    for part in ("bin", "idx"):
        file = tmp_path / f"c.{part}"
        assert sidecar[part] == {
            "bytes": file.stat().st_size,
            "sha256": hash_file(file).sha256,
        }
    assert check_corpus(tmp_path / "c", "d", 65000, read_all=True).max_token_id == 40000


def test_modes_honour_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "c", DOCUMENTS)
    finally:
        os.umask(before)
    assert {(tmp_path / f"c{s}").stat().st_mode & 0o777 for s in SUFFIXES} == {0o640}


def test_an_existing_corpus_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "c", DOCUMENTS)
    with pytest.raises(ConfigError, match=r"c\.bin exists; --overwrite"):
        write(tmp_path / "c", OTHERS)
    assert parse(tmp_path / "c") == DOCUMENTS
    write(tmp_path / "c", OTHERS, overwrite=True)
    assert parse(tmp_path / "c") == OTHERS
    assert len(list(tmp_path.iterdir())) == 3


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", np.dtype(np.uint16)) as first:
        first.add(np.array([1], np.uint16), np.array([1], np.int32), np.array([1]))
        with pytest.raises(ConfigError, match="another process is writing"):
            CorpusWriter(tmp_path / "c", np.dtype(np.uint16))
        first.prepare(FACTS)
        first.publish()
    assert parse(tmp_path / "c") == [[[1]]]


def test_no_link_is_followed_and_nobody_foresees_a_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("a file of the user's")
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in (".c.bin.tmp", ".c.idx.tmp", ".c.json.tmp", ".c.tmp.0", "c.bin"):
        (folder / name).symlink_to(mine)
    (folder / ".c.tmp.1").symlink_to(tmp_path)
    write(folder / "c", DOCUMENTS, overwrite=True)
    assert parse(folder / "c") == DOCUMENTS and mine.read_text() == "a file of the user's"
    kind = np.dtype(np.uint16)
    with CorpusWriter(tmp_path / "d", kind) as one, CorpusWriter(tmp_path / "e", kind) as two:
        assert one.folder.name[-8:] != two.folder.name[-8:]


def test_a_failure_leaves_the_old_corpus_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c", DOCUMENTS)
    with (
        pytest.raises(ZeroDivisionError),
        CorpusWriter(tmp_path / "c", np.dtype(np.uint16), overwrite=True),
    ):
        raise ZeroDivisionError

    def full(self: object, piece: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.HashedFile, "write", full)
    with pytest.raises(StorageError, match="No space left") as caught:
        write(tmp_path / "c", OTHERS, overwrite=True)
    assert caught.value.exit_code == 4
    assert parse(tmp_path / "c") == DOCUMENTS
    assert len(list(tmp_path.iterdir())) == 3


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


@pytest.mark.parametrize("steps", range(5))
@pytest.mark.parametrize("old", [None, DOCUMENTS])
def test_a_writer_killed_between_its_renames_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, old: list[Document] | None
) -> None:
    prefix = tmp_path / "c"
    if old:
        write(prefix, old)
    left = steps

    def step(function: Any) -> Any:
        def wrapped(*args: Any, **kw: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **kw)

        return wrapped

    with CorpusWriter(prefix, np.dtype(np.uint16), overwrite=True) as writer:
        writer.add(np.array([8, 8, 9], np.uint16), np.array([2, 1], np.int32), np.array([1, 1]))
        writer.prepare(FACTS)
        with monkeypatch.context() as patch:
            patch.setattr(indexed.os, "replace", step(os.replace))
            patch.setattr(Path, "unlink", step(Path.unlink))
            try:
                writer.publish()
                assert steps == 4, "fewer kills than steps"
            except Killed:
                assert steps < 4
    # whatever a reader meets now is the old, the new, or nothing
    try:
        facts = check_corpus(prefix, "d", 65000, read_all=True)
        assert parse(prefix) == (OTHERS if facts.tokens == 3 else old)
    except (ConfigError, DamagedError):
        assert not (tmp_path / "c.idx").exists()
    finished = finish_interrupted(prefix)
    old_is_whole = bool(old) and steps == 0  # its index is still there
    assert finished == (steps < 4 and not old_is_whole)
    assert parse(prefix) == (old if old_is_whole else OTHERS)
    check_corpus(prefix, "d", 65000, read_all=True)
    write(prefix, OTHERS, overwrite=True)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("steps", range(1, 4))
def test_after_a_writer_was_killed_at_the_end_the_same_command_just_works(
    tmp_path: Path, steps: int
) -> None:
    writer = CorpusWriter(tmp_path / "c", np.dtype(np.uint16))
    writer.add(np.array([8, 8, 9], np.uint16), np.array([2, 1], np.int32), np.array([1, 1]))
    writer.prepare(FACTS)
    for suffix in SUFFIXES[:steps]:
        os.replace(writer.folder / suffix[1:], corpus_path(writer.prefix, suffix))
    writer._publishing = True  # as if it had been killed: its exit removes nothing
    writer.__exit__(None, None, None)
    if steps == 3:  # whole, and nothing tells that the run did not report it
        with pytest.raises(ConfigError, match="exists"):
            write(tmp_path / "c", OTHERS)
    else:
        write(tmp_path / "c", OTHERS)
    assert parse(tmp_path / "c") == OTHERS
    write(tmp_path / "c", OTHERS, overwrite=True)  # sweeps a directory that is empty by now
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["no sidecar", "half a sidecar", "other sidecar", "short index"])
def test_leftovers_of_a_writer_killed_earlier_are_not_published(
    tmp_path: Path, damage: str
) -> None:
    prefix = tmp_path / "c"
    writer = CorpusWriter(prefix, np.dtype(np.uint16))
    writer.add(np.array([8], np.uint16), np.array([1], np.int32), np.array([1]))
    writer.prepare(FACTS)
    sidecar, index = writer.folder / "json", writer.folder / "idx"
    if damage == "no sidecar":
        sidecar.unlink()
    elif damage == "half a sidecar":
        sidecar.write_bytes(sidecar.read_bytes()[:40])
    elif damage == "other sidecar":
        sidecar.write_text("[]")
    else:
        index.write_bytes(index.read_bytes()[:-1])
    writer._publishing = True  # as if it had been killed: its exit removes nothing
    writer.__exit__(None, None, None)
    assert not finish_interrupted(prefix)
    assert not corpus_path(prefix, ".idx").exists()
    write(prefix, OTHERS)
    assert parse(prefix) == OTHERS
    assert len(list(tmp_path.iterdir())) == 3
