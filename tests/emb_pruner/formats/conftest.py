"""Small real tokenizers of every format, trained on Python's own documentation."""

from __future__ import annotations

import base64
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.formats.spelling import bytes_of

FOREIGN = (
    "naïve cafés, 你好世界 🙂 Ελλάδα κόσμος привет мир на земле ελληνικά 你好 \t\n  x\n\n" * 20
)
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>' }}"
    "{% endfor %}"
)


def prose() -> list[str]:
    """Lines, each with its end."""
    pages = [topics[name] for name in sorted(topics)[:25]]
    return [line for page in [*pages, FOREIGN * 20] for line in page.splitlines(keepends=True)]


def _byte_level(folder: Path) -> Path:
    from tests.data.conftest import write_bpe

    write_bpe(folder, "".join(prose()), vocab_size=1200)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def _sentencepiece(folder: Path, kind: str, **more: object) -> Path:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line.rstrip("\n") for line in prose()),
        model_prefix=str(folder / "tokenizer"),
        model_type=kind,
        vocab_size=900,
        character_coverage=1.0,
        user_defined_symbols=["<mask>"],
        minloglevel=2,
        **more,
    )
    return folder / "tokenizer.model"


def _spm_bpe(folder: Path) -> Path:
    return _sentencepiece(
        folder,
        "bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )


def _unigram(folder: Path) -> Path:
    return _sentencepiece(folder, "unigram", byte_fallback=False)


def _llama(folder: Path) -> Path:
    """A directory with the same vocabulary as tokenizer.json and as a SentencePiece model."""
    from transformers import LlamaTokenizer

    model = _spm_bpe(folder)
    LlamaTokenizer.from_pretrained(str(folder)).save_pretrained(str(folder))
    assert model.is_file()
    return folder


def _tiktoken(folder: Path) -> Path:
    """Ranks as a byte-level BPE learned them."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prose(), trainer)
    vocab = json.loads(tokenizer.to_str())["model"]["vocab"]
    lines = [
        base64.b64encode(bytes_of(token) or b"") + b" %d\n" % id
        for token, id in sorted(vocab.items(), key=lambda item: item[1])
    ]
    (folder / "small-qwen.tiktoken").write_bytes(b"".join(lines))
    return folder / "small-qwen.tiktoken"


FORMATS = {
    "tokenizers BPE": _byte_level,
    "SentencePiece BPE": _spm_bpe,
    "SentencePiece Unigram": _unigram,
    "llama": _llama,
    "tiktoken": _tiktoken,
}


@pytest.fixture(scope="session", params=list(FORMATS))
def vocabulary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Vocabulary:
    if request.param == "tiktoken":
        pytest.importorskip("tiktoken")
    return make(request.param, tmp_path_factory.mktemp("vocabulary"))


def make(name: str, folder: Path) -> Vocabulary:
    return open_vocabulary(FORMATS[name](folder))
