"""Small real tokenizers and texts, made here; nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "12",
    "engineers",
    "prune",
    "one",
    "model",
    ",",
    "shard",
    "by",
    "shard",
    "naïve",
    "café",
    "你好",
    "🙂",
    "x**2",
    "=",
    "4.75",
    ";",
    "Dr.",
    "Smith's",
    "e.g.",
    "<s>",
    "</s>",
    "\t",
    "\n",
]


def write_bpe(folder: Path, text: str, vocab_size: int = 379) -> Path:
    """A Hugging Face directory with a byte-level BPE tokenizer, as a checkpoint carries one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of 0 to 59 words, with special tokens' names, spaces and line ends in them."""
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(60))) for _ in range(80)]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_bpe(tmp_path_factory.mktemp("bpe"), " ".join(texts))


@pytest.fixture(scope="session")
def spm(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture()
def jsonl(tmp_path: Path, texts: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text, "title": text[:9]}) + "\n" for text in texts))
    return path
