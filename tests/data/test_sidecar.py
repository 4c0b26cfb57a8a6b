from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.data import sidecar
from megatron_prune.data.indexed import CorpusWriter
from megatron_prune.data.sidecar import check_corpus
from megatron_prune.errors import ConfigError, DamagedError, PruneError

VOCAB = 379
FACTS = {"version": 1, "tokenizer": "tok", "tokenizer_digest": "a" * 64, "vocab_size": VOCAB}


@pytest.fixture()
def prefix(tmp_path: Path) -> Path:
    """Twelve documents of one to three sequences; ids up to 378."""
    rng = np.random.default_rng(0)
    with CorpusWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        counts = rng.integers(1, 4, 12)
        lengths = rng.integers(1, 30, counts.sum()).astype(np.int32)
        ids = rng.integers(0, VOCAB, lengths.sum()).astype(np.uint16)
        ids[len(ids) // 2] = VOCAB - 1
        writer.add(ids, lengths, counts)
        writer.prepare(FACTS | {"eod": 1})
        writer.publish()
    return tmp_path / "c"


def test_a_whole_corpus_is_described(prefix: Path) -> None:
    facts = check_corpus(prefix, "a" * 64, VOCAB, read_all=True)
    assert (facts.documents, facts.dtype, facts.eod) == (12, "uint16", 1)
    assert facts.tokens == (prefix.with_suffix(".bin")).stat().st_size // 2
    assert facts.tokenizer_digest == "a" * 64
    assert facts.max_token_id == VOCAB - 1
    assert check_corpus(prefix, None, VOCAB) == facts


def test_a_stock_corpus_without_a_sidecar_is_taken(prefix: Path) -> None:
    prefix.with_suffix(".json").unlink()
    facts = check_corpus(prefix, "b" * 64, VOCAB)
    assert facts.documents == 12
    assert (facts.tokenizer_digest, facts.eod, facts.max_token_id) == (None, None, None)


def test_another_tokenizer_is_refused_by_its_digest(prefix: Path) -> None:
    with pytest.raises(ConfigError, match=r"ids are those of tok .*model's tokenizer is another"):
        check_corpus(prefix, "b" * 64, VOCAB)


@pytest.mark.parametrize("with_sidecar", [True, False])
def test_an_id_outside_the_vocabulary_is_refused(prefix: Path, with_sidecar: bool) -> None:
    if not with_sidecar:
        prefix.with_suffix(".json").unlink()
    with pytest.raises(ConfigError, match=r"id 378, the model's vocabulary has 378"):
        check_corpus(prefix, None, VOCAB - 1)


def test_a_negative_id_is_refused(prefix: Path) -> None:
    prefix.with_suffix(".json").unlink()
    index = bytearray(prefix.with_suffix(".idx").read_bytes())
    index[17] = 3  # int16, of the same size
    prefix.with_suffix(".idx").write_bytes(index)
    data = np.fromfile(prefix.with_suffix(".bin"), np.int16)
    data[7] = -1
    data.tofile(prefix.with_suffix(".bin"))
    with pytest.raises(ConfigError, match="token 7 has the id -1"):
        check_corpus(prefix, None, VOCAB)


def test_the_sample_reaches_both_ends_of_a_long_corpus(tmp_path: Path) -> None:
    ids = np.zeros(2_000_000, np.uint16)
    for at in (0, 1_999_999):
        ids[at] = VOCAB
        with CorpusWriter(tmp_path / "c", np.dtype(np.uint16), overwrite=True) as writer:
            writer.add(ids, np.array([len(ids)], np.int32), np.array([1]))
            writer.prepare(FACTS)
            writer.publish()
        (tmp_path / "c.json").unlink()
        with pytest.raises(ConfigError, match=f"token {at} has the id {VOCAB}"):
            check_corpus(tmp_path / "c", None, VOCAB)
        ids[at] = 0


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "c", np.dtype(np.uint16)) as writer:
        writer.add(np.array([], np.uint16), np.array([], np.int32), np.array([0, 0]))
        writer.prepare(FACTS)
        writer.publish()
    with pytest.raises(ConfigError, match="an empty corpus, 2 documents and no token"):
        check_corpus(tmp_path / "c", None, VOCAB)


@pytest.mark.parametrize("keep_sidecar", [True, False])
def test_truncated_files_are_always_refused(prefix: Path, keep_sidecar: bool) -> None:
    if not keep_sidecar:
        prefix.with_suffix(".json").unlink()
    for suffix in (".idx", ".bin"):
        file = prefix.with_suffix(suffix)
        whole = file.read_bytes()
        for size in [*range(0, len(whole), 7), len(whole) - 1]:
            file.write_bytes(whole[:size])
            with pytest.raises(DamagedError) as caught:
                check_corpus(prefix, None, VOCAB)
            assert file.name in str(caught.value)
        file.write_bytes(whole + b"\0")
        with pytest.raises(DamagedError, match=file.name):
            check_corpus(prefix, None, VOCAB)
        file.write_bytes(whole)
    check_corpus(prefix, None, VOCAB)


def test_a_flipped_bit_is_refused_where_there_is_a_sidecar(prefix: Path) -> None:
    rng = random.Random(0)
    for suffix in (".idx", ".bin"):
        file = prefix.with_suffix(suffix)
        whole = file.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            file.write_bytes(data)
            with pytest.raises(PruneError):
                check_corpus(prefix, None, VOCAB, read_all=suffix == ".bin")
        file.write_bytes(whole)


def test_a_flipped_bit_in_a_stock_index_is_refused_or_harmless(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a hash, only the place of a document's end can move unseen."""
    prefix.with_suffix(".json").unlink()
    monkeypatch.setattr(sidecar, "_PIECE", 5)
    whole = prefix.with_suffix(".idx").read_bytes()
    sequences = int.from_bytes(whole[18:26], "little")
    for at in range(len(whole)):
        data = bytearray(whole)
        data[at] ^= 1 << (at % 8)
        prefix.with_suffix(".idx").write_bytes(data)
        if at < 34 + 12 * sequences:
            with pytest.raises(PruneError):
                check_corpus(prefix, None, VOCAB)
        else:
            try:
                assert check_corpus(prefix, None, VOCAB).documents == 12
            except DamagedError:
                continue


@pytest.mark.parametrize("change", [-1, 1, 10**9])
def test_documents_that_do_not_end_with_the_last_sequence_are_refused(
    prefix: Path, change: int
) -> None:
    prefix.with_suffix(".json").unlink()
    raw = bytearray(prefix.with_suffix(".idx").read_bytes())
    end = int.from_bytes(raw[-8:], "little") + change
    raw[-16:] = min(int.from_bytes(raw[-16:-8], "little"), end).to_bytes(8, "little") + (
        end.to_bytes(8, "little")
    )
    prefix.with_suffix(".idx").write_bytes(raw)
    with pytest.raises(DamagedError, match=r"c\.idx: the documents end at sequence \d+ of \d+"):
        check_corpus(prefix, None, VOCAB)


def test_files_of_two_corpora_are_refused(prefix: Path, tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "other", np.dtype(np.uint16)) as writer:
        writer.add(np.array([1, 2], np.uint16), np.array([2], np.int32), np.array([1]))
        writer.prepare(FACTS)
        writer.publish()
    shutil.copy(tmp_path / "other.json", tmp_path / "c.json")
    with pytest.raises(DamagedError, match=r"sidecar .*c\.json tells of 2 in 1: files of two"):
        check_corpus(prefix, None, VOCAB)
    shutil.copy(tmp_path / "other.idx", tmp_path / "c.idx")
    with pytest.raises(DamagedError, match=r"c\.bin: \d+ bytes, but .*c\.idx tells of 2 tokens"):
        check_corpus(prefix, None, VOCAB)


def test_half_a_pair_and_no_pair_are_told_apart(prefix: Path) -> None:
    with pytest.raises(ConfigError, match=r"no corpus at .*leave out \.bin"):
        check_corpus(f"{prefix}.bin", None, VOCAB)
    text = prefix.with_name("a.jsonl")
    text.write_text("{}")
    with pytest.raises(ConfigError, match=r"a\.jsonl.*preprocess` makes a corpus of \.jsonl"):
        check_corpus(text, None, VOCAB)
    prefix.with_suffix(".idx").unlink()
    with pytest.raises(DamagedError, match=r"there is a \.bin but no \.idx"):
        check_corpus(prefix, None, VOCAB)


def test_the_right_prefix_is_suggested(prefix: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        prefix.with_suffix(suffix).rename(tmp_path / f"c_text_document{suffix}")
    with pytest.raises(ConfigError, match=r"did you mean .*c_text_document"):
        check_corpus(prefix, None, VOCAB)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "[" * 100000, json.dumps(FACTS), '{"version": 1, "bin": 3}']
)
def test_a_broken_sidecar_is_damaged(prefix: Path, content: str) -> None:
    prefix.with_suffix(".json").write_text(content)
    with pytest.raises(DamagedError, match=r"c\.json: not the sidecar"):
        check_corpus(prefix, None, VOCAB)
