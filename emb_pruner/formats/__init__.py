"""Tokenizers as files that can be pruned: what every format offers, and which one a path holds.

Accepted: a Hugging Face directory, one of our Megatron checkpoints (its ``hf`` companion), a
``tokenizer.json``, a SentencePiece ``*.model`` and tiktoken ranks, with BPE or Unigram models. No
code of a tokenizer's author is run. Refused by name: WordPiece, WordLevel and other models.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from emb_pruner.forest import Forest
from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.data.tokenizers import document_by_transformers, tokenizer_directory
from megatron_prune.errors import ConfigError

_WANTED = (
    "a tokenizer.json, a SentencePiece .model file, tiktoken ranks, or a directory with one of them"
)


class Vocabulary(Protocol):
    """A tokenizer as its files.

    Attributes:
        path: what it was opened from; `open_vocabulary` of it gives the same again, in a worker.
        kind: for reports: ``tokenizers BPE``, ``SentencePiece Unigram``, ``tiktoken``...
        size: the largest id and one, added tokens included.
    """

    path: Path
    kind: str
    size: int

    @property
    def forest(self) -> Forest:
        """Of all ids, specials and added tokens included; seconds of work, done once."""

    @property
    def digest(self) -> str:
        """As `megatron_prune.data.tokenizers.TextTokenizer.digest`."""

    def token(self, id: int) -> str:
        """As the files spell it, for reports; empty for an id without a token."""

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; none are added, special tokens in the text are found."""

    def units(self, text: str) -> list[str]:
        """What the text is cut into before tokens are sought; each is tokenised by itself.

        ``encode([text])[0]`` is the ids of its units one after the other. Units are in the
        tokenizer's own spelling (``Ġthe``, ``▁the``): for `encode_units`, not for `encode`. With
        Unigram a whole text may be one.
        """

    def encode_units(self, units: Sequence[str]) -> list[list[int]]:
        """The ids of each unit."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens spelled out."""

    def write(self, plan: VocabPlan, directory: Path) -> list[str]:
        """Write all files of the tokenizer, pruned, into an existing directory; their names.

        Raises:
            PlanError: a plan for another tokenizer, or one that is not closed.
        """

    def written(self, directory: Path) -> Path:
        """What to open to have this form again after `write`, which may have written others."""


def open_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer at ``path``; see the module for what a path may be.

    Raises:
        ConfigError: nothing there, or a tokenizer that cannot be pruned, by its name.
        DamagedError: a tokenizer's file that cannot be read as one.
    """
    path = Path(path)
    if path.is_file():
        return _of_file(path)
    from emb_pruner.formats import sentencepiece, tokenizer_json
    from emb_pruner.formats.sentencepiece import SentencePiece
    from emb_pruner.formats.tiktoken import Tiktoken
    from emb_pruner.formats.tokenizer_json import (
        TokenizerJson,
        check_tokenizer_model,
        read_document,
    )

    folder = tokenizer_directory(path)
    described = (folder / "tokenizer_config.json").is_file()
    if (file := folder / tokenizer_json.FILE).is_file():
        return TokenizerJson(path, read_document(file), folder=folder)
    if ranks := sorted(folder.glob("*.tiktoken")):
        return Tiktoken(path, ranks[0])
    if (file := folder / sentencepiece.FILE).is_file() and not described:
        return SentencePiece(path, file)
    if not (described or (folder / "vocab.json").is_file()):
        raise ConfigError(f"tokenizer {path}: no tokenizer files in {folder}; wanted {_WANTED}")
    document = document_by_transformers(folder)
    check_tokenizer_model(path, document["model"])
    return TokenizerJson(path, document, folder=folder)


def _of_file(path: Path) -> Vocabulary:
    from emb_pruner.formats.sentencepiece import SentencePiece
    from emb_pruner.formats.tiktoken import Tiktoken
    from emb_pruner.formats.tokenizer_json import TokenizerJson, read_document

    if path.suffix == ".tiktoken":
        return Tiktoken(path, path)
    if path.suffix == ".model":
        return SentencePiece(path, path)
    if path.suffix == ".json":
        return TokenizerJson(path, read_document(path))
    raise ConfigError(f"tokenizer {path}: wanted {_WANTED}")
