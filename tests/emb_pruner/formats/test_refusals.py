"""What cannot be pruned is refused by its name, before anything is written."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from emb_pruner.formats import open_vocabulary
from megatron_prune.errors import ConfigError, DamagedError, PruneError
from tests.emb_pruner.formats.conftest import make


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (models.WordPiece(vocab={"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "its model is WordPiece"),
        (models.WordLevel(vocab={"[UNK]": 0}, unk_token="[UNK]"), "its model is WordLevel"),
        (
            models.BPE(vocab={"a": 0, "b</w>": 1}, merges=[], end_of_word_suffix="</w>"),
            "end_of_word_suffix '</w>'",
        ),
    ],
)
def test_other_models_of_tokenizer_json(model: models.Model, name: str, tmp_path: Path) -> None:
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match=name):
            open_vocabulary(path)


def test_sentencepiece_models_of_words(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the lazy dog jumps over the lazy dog"] * 9),
        model_prefix=str(tmp_path / "words"),
        model_type="word",
        vocab_size=8,
        minloglevel=2,
    )
    with pytest.raises(ConfigError, match="of type word; those of BPE and Unigram"):
        open_vocabulary(tmp_path / "words.model")


def ranks(tokens: list[bytes], numbers: list[int] | None = None) -> bytes:
    numbered = zip(tokens, numbers or range(len(tokens)))
    return b"".join(base64.b64encode(token) + b" %d\n" % number for token, number in numbered)


BYTES = [bytes([value]) for value in range(256)]


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("qwen.tiktoken", ranks(BYTES[:92]), ConfigError, "164 of the 256 single bytes are miss"),
        ("glm.tiktoken", ranks(BYTES), ConfigError, "known are those of qwen"),
        ("qwen.tiktoken", b"IQ== 0\nnonsense\n", DamagedError, "line 2: found b'nonsense'"),
        ("qwen.tiktoken", b"IQ== 0\nIg== 2\n", DamagedError, "2 ranks that are not 0 to 1"),
        ("tokenizer.model", b"IQ== 0\n", ConfigError, "tiktoken ranks, of which those of qwen"),
        ("tokenizer.model", b"\xff rubbish", DamagedError, "cannot be read"),
        ("tokenizer.model", b"", DamagedError, "no SentencePiece model"),
        ("tokenizer.json", b'{"model": [', DamagedError, "not a tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "BPE"}}', DamagedError, "cannot be read"),
        ("tokenizer.json", b'{"kept": {}}', ConfigError, "no tokenizer.json"),
        ("vocab.txt", b"[UNK]\n", ConfigError, "wanted a tokenizer.json, a SentencePiece"),
    ],
)
def test_files_that_cannot_be_pruned(
    name: str, content: bytes, kind: type[PruneError], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        open_vocabulary(tmp_path / name)


def test_missing_and_empty_directories(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file or directory"):
        open_vocabulary(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no tokenizer files in"):
        open_vocabulary(tmp_path)


def test_a_sentencepiece_form_with_other_ids(tmp_path: Path) -> None:
    make("tokenizers BPE", tmp_path)
    (other := tmp_path / "other").mkdir()
    make("SentencePiece BPE", other)
    (other / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    vocabulary = open_vocabulary(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer.model: piece '.*' has id"):
        _ = vocabulary.forest
