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
from megatron_prune.data.tokenizers import tokenizer_directory
from megatron_prune.errors import ConfigError


class Vocabulary(Protocol):
    """A tokenizer as its files.

    Attributes:
        path: what it was opened from; `open_vocabulary` of it gives the same again, in a worker.
        kind: for reports: ``tokenizers BPE``, ``SentencePiece Unigram``, ``tiktoken``...
    """

    path: Path
    kind: str

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
        tokenizer's own spelling (``Ġthe``, ``▁the``): for `encode_units`, not for `encode`.
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


def open_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer at ``path``; see the module for what a path may be.

    Raises:
        ConfigError: nothing there, or a tokenizer that cannot be pruned, by its name.
        DamagedError: a tokenizer's file that cannot be read as one.
    """
    from emb_pruner.formats import tokenizer_json

    path = Path(path)
    if path.is_file() and path.suffix == ".json":
        return tokenizer_json.open_file(path)
    folder = tokenizer_directory(path)
    if (folder / "tokenizer.json").is_file():
        return tokenizer_json.open_file(folder / "tokenizer.json", path)
    raise ConfigError(
        f"tokenizer {path}: wanted a tokenizer.json, a SentencePiece .model file, tiktoken ranks, "
        "or a directory with one of them"
    )
