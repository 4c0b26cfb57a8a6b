"""Counts are those of encoding every document whole."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from emb_pruner import counting, reading
from emb_pruner.counting import TokenCounter, count_tokens
from emb_pruner.counts import Counts
from emb_pruner.formats import open_vocabulary
from emb_pruner.reading import check_corpora
from megatron_prune.data import corpus
from megatron_prune.data.indexed import CorpusWriter
from megatron_prune.errors import ConfigError, DamagedError
from tests.data.conftest import WORDS, write_bpe

# Units that cross lines: blanks in rows, indented lines, marks with the line ends behind them.
GLUE = [" "] * 12 + ["\n", "\n\n", "\r\n", "\n    ", ".\n\n", "  ", "\t", "", "(", "_", "▁"]


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "".join(rng.choice(WORDS) + rng.choice(GLUE) for _ in range(rng.randrange(120)))
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level one with special tokens, and Llama's kind as tokenizer.json, both small."""
    text = "\n".join(documents(80, seed=1))
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "byte-level": write_bpe(folder / "bpe", text, vocab_size=700),
        "uncut": uncut(write_bpe(folder / "uncut", text, vocab_size=700)),
        "sentencepiece": write_spm(folder, text),
    }


def uncut(folder: Path) -> Path:
    """A pretokeniser that nothing is known of."""
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": "\\p{L}+ ?|[^\\p{L}]+"},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": True,
                "use_regex": False,
            },
        ],
    }
    path.write_text(json.dumps(document))
    return folder


def write_spm(folder: Path, text: str) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def count(path: Path, *inputs: Path, workers: int = 1, kind: str | None = None) -> Counts:
    counter = TokenCounter(path, "text")
    found = check_corpora(list(inputs), kind, counter.vocabulary.digest, counter.vocabulary.size)
    return count_tokens(counter, found, workers=workers)


def of_whole_documents(path: Path, texts: list[str]) -> dict[int, int]:
    vocabulary = open_vocabulary(path)
    return dict(Counter(id for ids in vocabulary.encode(texts) for id in ids))


def as_dict(counts: Counts) -> dict[int, int]:
    return {int(id): int(counts.counts_V[id]) for id in counts.counts_V.nonzero()[0]}


@pytest.fixture()
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small corpus has many pieces, and the table is emptied again and again."""
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(reading, "TEXT_BLOCK_BYTES", 700)
    monkeypatch.setattr(reading, "IDS", 100)
    monkeypatch.setattr(counting, "TABLE_CHARACTERS", 3000)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


KINDS = ["byte-level", "uncut", "sentencepiece"]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.usefixtures("small_pieces")
def test_counts_are_those_of_whole_documents(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    lines, long = documents(60), "".join(documents(60, seed=2))
    write_jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.txt").write_bytes(long.encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + long[::-1].encode()))
    inputs = [tmp_path / "a.jsonl", tmp_path / "b.txt", tmp_path / "c.txt.gz"]
    texts = [*lines, long, long[::-1]]
    counts = count(tokenizers[name], *inputs)
    assert as_dict(counts) == of_whole_documents(tokenizers[name], texts)
    assert counts.documents == 62
    assert counts.characters == sum(map(len, texts))
    assert counts.bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece"])
def test_workers_count_what_one_process_does(
    name: str, tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "CHUNK_BYTES", 3000)
    monkeypatch.setattr(reading, "TEXT_BLOCK_BYTES", 700)
    lines, long = documents(60), "".join(documents(60, seed=2))
    write_jsonl(tmp_path / "a.jsonl", lines)
    (tmp_path / "b.txt").write_bytes(long.encode())
    counts = count(tokenizers[name], tmp_path / "a.jsonl", tmp_path / "b.txt", workers=2)
    assert as_dict(counts) == of_whole_documents(tokenizers[name], [*lines, long])
    assert counts.documents == 61 and counts.characters == sum(map(len, [*lines, long]))


def test_cutting_anywhere_would_count_otherwise(
    tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    """The control: lines, each by itself."""
    long = "".join(documents(60, seed=2))
    whole = of_whole_documents(tokenizers["byte-level"], [long])
    assert of_whole_documents(tokenizers["byte-level"], long.splitlines(keepends=True)) != whole


def write_ids(prefix: Path, ids: list[int], lengths: list[int]) -> None:
    with CorpusWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add(
            np.array(ids, dtype=np.uint16),
            np.array(lengths, dtype=np.int32),
            np.ones(len(lengths), dtype=np.int64),
        )
        writer.prepare({})
        writer.publish()
    corpus_sidecar = Path(f"{prefix}.json")
    corpus_sidecar.unlink()  # as stock Megatron-LM leaves a corpus


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("named", ["c.bin", "c.idx", "c"])
def test_ids_of_token_files_are_counted_as_they_are(
    named: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    rng = random.Random(0)
    ids = [rng.randrange(600) for _ in range(950)]
    write_ids(tmp_path / "c", ids, [400, 0, 550])
    counts = count(tokenizers["byte-level"], tmp_path / named)
    assert as_dict(counts) == dict(Counter(ids))
    assert (counts.documents, counts.bytes, counts.characters) == (3, 0, 0)


def test_ids_beyond_the_vocabulary_are_refused_with_the_id(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_prune.data import sidecar

    size = open_vocabulary(tokenizers["byte-level"]).size
    ids = [5] * 950
    ids[777] = size
    write_ids(tmp_path / "c", ids, [950])
    for samples in (64, 0):  # seen in the sample before counting; and by counting alone
        monkeypatch.setattr(sidecar, "_SAMPLES", samples)
        with pytest.raises(ConfigError, match=rf"c\.bin: token 777 has the id {size}, .* {size}"):
            count(tokenizers["byte-level"], tmp_path / "c.bin")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.txt": (lambda path: path.touch(), "empty corpus: 0 documents and no token in .*empty"),
    "blank.jsonl": (lambda path: path.write_text('\n{"text": ""}\n'), "empty corpus: 1 documents"),
    "body.jsonl": (lambda path: path.write_text('{"body": "a"}\n'), "line 1: no key 'text'"),
    "latin.txt": (lambda path: path.write_bytes(b"caf\xe9 a"), "latin.txt: not UTF-8"),
    "cut.txt": (lambda path: path.write_bytes("é".encode()[:1]), "cut.txt: not UTF-8"),
    "some.csv": (lambda path: path.write_text("a,b\n"), "some.csv: wanted .txt, .jsonl"),
    "nowhere.txt": (lambda path: None, "nowhere.txt: No such file"),
    "nowhere": (lambda path: None, "nowhere: No such file"),
    "folder.txt": (lambda path: path.mkdir(), "folder.txt is a directory"),
    "lone.bin": (lambda path: path.touch(), "there is a .bin but no .idx"),
}


@pytest.mark.parametrize("name", BAD)
def test_inputs_that_cannot_be_counted_are_refused(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    make, said = BAD[name]
    make(tmp_path / name)
    with pytest.raises((ConfigError, DamagedError), match=said):
        count(tokenizers["byte-level"], tmp_path / name)


def test_an_input_named_twice_is_refused(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    write_ids(tmp_path / "c", [1, 2], [2])
    with pytest.raises(ConfigError, match=r"c\.idx|c: named twice"):
        count(tokenizers["byte-level"], tmp_path / "c.bin", tmp_path / "c.idx")


def test_a_long_text_that_cannot_be_cut_is_refused(
    tokenizers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "TEXT_BLOCK_BYTES", 100)
    monkeypatch.setattr(reading, "TEXT_BYTES_MAX", 1000)
    (tmp_path / "a.txt").write_text("word " * 1000)
    with pytest.raises(ConfigError, match=r"a\.txt: over 1000 characters without a place"):
        count(tokenizers["uncut"], tmp_path / "a.txt")
    assert count(tokenizers["byte-level"], tmp_path / "a.txt").documents == 1


def test_the_kind_may_be_said(tokenizers: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mmlu.json").write_text('{"a": "the fox"}\n{"a": "the dog"}')
    counts = count(tokenizers["byte-level"], tmp_path / "mmlu.json", kind="txt")
    whole = (tmp_path / "mmlu.json").read_text()
    assert as_dict(counts) == of_whole_documents(tokenizers["byte-level"], [whole])
