from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.data import corpus
from megatron_prune.data.corpus import (
    Documents,
    Encoder,
    LineChunk,
    check_inputs,
    map_pieces,
    parse_lines,
    read_chunks,
)
from megatron_prune.data.sentences import train_splitter
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import ConfigError, DamagedError, DistributedError


def lines_of(*paths: Path) -> list[list[str]]:
    return [row for chunk in read_chunks(paths) for row in parse_lines(chunk, ["text"])]


def encoder_for(spm: Path, **options: object) -> Encoder:
    tokenizer = load_tokenizer(spm)
    values = {"keys": ("text",), "dtype": np.dtype(np.uint16), "eod": tokenizer.eod} | options
    return Encoder(tokenizer=tokenizer, **values)  # type: ignore[arg-type]


def flat(parts: Iterator[tuple[LineChunk, list[Documents]]]) -> tuple[list[int], ...]:
    found = [documents[0] for _, documents in parts]
    return tuple(
        [int(x) for d in found for x in getattr(d, name)]
        for name in ("tokens", "lengths", "sequences_per_document")
    )


@pytest.mark.parametrize("chunk_bytes", [1, 300, 1 << 19])
def test_chunks_hold_every_line_in_order_with_its_number(
    jsonl: Path, texts: list[str], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", chunk_bytes)
    assert lines_of(jsonl, jsonl) == [[text] for text in texts * 2]
    whole = jsonl.read_bytes().splitlines(keepends=True)
    chunks = list(read_chunks([jsonl]))
    for chunk in chunks:
        start = chunk.first_line - 1
        assert chunk.lines == whole[start : start + len(chunk.lines)]
    assert (
        sum(chunk.file_bytes for chunk in chunks) == jsonl.stat().st_size == check_inputs([jsonl])
    )
    assert len(chunks) == {1: len(texts), 1 << 19: 1}.get(chunk_bytes, len(chunks)) > 0


def test_blank_lines_marks_and_missing_last_line_ends_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n  \n{"text": "\\u00e9\\ud83d\\ude42"}')
    assert lines_of(path) == [["a"], ["é🙂"]]


def test_gzip_is_read_as_it_is_and_a_cut_one_is_damaged(
    jsonl: Path, texts: list[str], tmp_path: Path
) -> None:
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(jsonl.read_bytes()))
    assert lines_of(packed) == [[text] for text in texts]
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(DamagedError, match=r"c\.jsonl\.gz: not a whole gzip file"):
        lines_of(packed)


def test_zstandard_is_read_as_it_is_and_a_cut_one_is_damaged(
    jsonl: Path, texts: list[str], tmp_path: Path
) -> None:
    zstd = pytest.importorskip("backports.zstd")
    packed = tmp_path / "c.jsonl.zst"
    half = len(jsonl.read_bytes()) // 2
    parts = jsonl.read_bytes()[:half], jsonl.read_bytes()[half:]
    packed.write_bytes(b"".join(map(zstd.compress, parts)))
    assert lines_of(packed) == [[text] for text in texts]
    whole = packed.read_bytes()
    for broken in (whole[:-20], b"text" + whole):
        packed.write_bytes(broken)
        with pytest.raises(DamagedError, match=r"c\.jsonl\.zst: not a whole zstandard file"):
            lines_of(packed)


def test_zstandard_without_its_reader_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.zst").touch()
    script = "import sys; sys.modules['compression'] = sys.modules['backports'] = None\n"
    script += "from megatron_prune.data.corpus import check_inputs; check_inputs(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.jsonl.zst")],
        capture_output=True,
        text=True,
    )
    assert "pip install 'megatron_prune[zstd]'" in done.stderr.splitlines()[-1]


BAD_LINES = {
    b"words": r"not JSON .*wanted one object a line",
    b'{"text": "a"': r"not JSON",
    b'{"text": "a"} {"text": "b"}': r"not JSON",
    b"[" * 100000: r"not JSON",
    b'{"text": ' + b"9" * 5000 + b"}": r"not JSON",
    b'["a"]': r"a JSON list, wanted an object with the key 'text'",
    b'{"body": "a", "id": 3}': r"no key 'text', the keys there: 'body', 'id'",
    b"{}": r"no key 'text', the keys there: none",
    b'{"text": null}': r"'text' is null, wanted a string",
    b'{"text": ["a", "b"]}': r"'text' is \[\"a\", \"b\"\], wanted a string",
    b'{"text": "a\xff"}': r"not UTF-8 .*byte 11",
    b'{"text": "ab\\ud83d"}': r"half a surrogate pair at character 2",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:14].decode(errors="replace"))
def test_a_bad_line_is_named_with_its_file(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + bad + b'\n{"text": "fine"}\n')
    with pytest.raises(ConfigError, match=BAD_LINES[bad]) as caught:
        lines_of(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert len(str(caught.value)) < 300 + len(str(path))


def test_a_line_without_end_is_refused_before_memory_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "LINE_BYTES_MAX", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + b"\0" * 5000)
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 2: over 1000 bytes"):
        lines_of(tmp_path / "a.jsonl")


def test_inputs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl.bz2").touch()
    for name, needle in (
        ("nowhere.jsonl", "No such file"),
        ("folder", "is a directory; wanted"),
        ("a.jsonl.bz2", r"\.bz2 is not read; unpack it"),
    ):
        with pytest.raises(ConfigError, match=needle) as caught:
            check_inputs([tmp_path / name])
        assert name in str(caught.value)


def test_a_document_is_its_ids_and_eod(spm: Path, jsonl: Path, texts: list[str]) -> None:
    encoder = encoder_for(spm)
    tokenizer = encoder.tokenizer
    wanted = [[*tokenizer.encode(text, True), tokenizer.eod] for text in texts]
    tokens, lengths, counts = flat(map_pieces(read_chunks([jsonl]), encoder))
    assert tokens == [i for ids in wanted for i in ids]
    assert lengths == [len(ids) for ids in wanted]
    assert counts == [1] * len(texts)
    plain = flat(map_pieces(read_chunks([jsonl]), encoder_for(spm, eod=None)))
    assert plain[1] == [length - 1 for length in lengths]


def test_sentences_are_sequences_and_eod_ends_the_last(spm: Path, tmp_path: Path) -> None:
    text = "The fox jumps. The dog is lazy!  Is it?"
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in (text, " ", "", "one"))
    )
    encoder = encoder_for(spm, splitter=train_splitter([text]))
    t = encoder.tokenizer
    wanted = [t.encode(s, True) for s in ("The fox jumps.", "The dog is lazy!", "Is it?", "one")]
    wanted[2].append(t.eod or 0)
    wanted[3].append(t.eod or 0)
    tokens, lengths, counts = flat(map_pieces(read_chunks([tmp_path / "a.jsonl"]), encoder))
    assert tokens == [i for ids in wanted for i in ids]
    assert lengths == [len(ids) for ids in wanted]
    assert counts == [3, 0, 0, 1]


def test_a_text_without_tokens_is_a_document_without_sequences(bpe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "fox"}\n')
    found = flat(map_pieces(read_chunks([tmp_path / "a.jsonl"]), encoder_for(bpe)))
    assert found[2] == [0, 1] and found[1] == [len(found[0])]


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_two_workers_give_what_one_gives(
    kind: str, jsonl: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 700)
    encoder = encoder_for(request.getfixturevalue(kind))
    chunks = list(read_chunks([jsonl]))
    assert len(chunks) > 8  # more than are under way at once
    one = list(map_pieces(chunks, encoder))
    two = list(map_pieces(chunks, encoder, workers=2))
    assert [chunk for chunk, _ in two] == chunks
    assert flat(iter(one)) == flat(iter(two))


def test_the_first_bad_line_is_named_by_any_number_of_workers(
    spm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 1)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the"}\n' * 5 + "bad\n" + "worse\n" * 5)
    for workers in (1, 2):
        with pytest.raises(ConfigError, match="line 6: not JSON"):
            list(map_pieces(read_chunks([path]), encoder_for(spm), workers))


def test_chunks_are_not_read_far_ahead_of_the_work(spm: Path) -> None:
    drawn = 0

    def endless() -> Iterator[LineChunk]:
        nonlocal drawn
        while True:
            drawn += 1
            yield LineChunk(path="x", first_line=1, lines=[b'{"text": "a"}'], file_bytes=0)

    found = map_pieces(endless(), encoder_for(spm), workers=2)
    for _ in range(10):
        next(found)
    assert drawn <= 10 + 2 * 2 + 2
    found.close()  # type: ignore[attr-defined]


class _KillsItsWorker:
    """Stands for a tokenizer that eats all memory: the kernel kills the process."""

    splitter = None

    def __call__(self, chunk: LineChunk) -> list[Documents]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_worker_that_is_killed_ends_the_work_with_a_message() -> None:
    chunks = [LineChunk(path="x", first_line=1, lines=[], file_bytes=0)] * 20
    with pytest.raises(DistributedError, match="one of the 2 workers ended without a word"):
        list(map_pieces(chunks, _KillsItsWorker(), workers=2))  # type: ignore[arg-type]


def test_an_id_that_does_not_fit_is_refused(spm: Path, jsonl: Path) -> None:
    encoder = encoder_for(spm, dtype=np.dtype(np.uint8), eod=300)
    with pytest.raises(ConfigError, match=r"corpus\.jsonl, from line 1: token id 3\d\d does not"):
        list(map_pieces(read_chunks([jsonl]), encoder))
