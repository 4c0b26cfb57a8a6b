"""``tokenizer.json`` of Hugging Face's tokenizers: BPE and Unigram models.

BPE keeps the merges whose two sides and result are kept, in their order. Whatever surrounds the
model (normaliser, pretokeniser, decoder, added tokens, post-processor) stays, with new ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from emb_pruner.forest import Forest, Parts
from emb_pruner.formats.companions import (
    fixed_by_companions,
    merged_otherwise,
    pruned_companions,
)
from emb_pruner.formats.growing import bpe_parts, forest, never_found
from emb_pruner.formats.json_writing import (
    check_numbers,
    dump_document,
    pruned_document,
    write_files,
)
from emb_pruner.formats.spelling import (
    BYTE_TOKEN,
    SPACE,
    WORDS,
    byte_level_text,
    crosses_words,
    letter_bytes,
)
from emb_pruner.vocab_plan import VocabPlan, check_fits
from megatron_prune.data.tokenizers import (
    check_ids,
    load_tokenizer,
    no_tokenizer,
    unreadable,
)
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.files.parsing import checked_as, read_table

FILE = "tokenizer.json"  # as it is written, whatever name it was read by
MODELS = ("BPE", "Unigram")


def read_document(path: Path) -> dict[str, Any]:
    """A tokenizer.json as it stands.

    Raises:
        ConfigError: a model that cannot be pruned, or another kind of file.
        DamagedError: it cannot be read.
    """
    if other := no_tokenizer(path):
        raise ConfigError(f"tokenizer {path}: {other}")
    what, advice = "not a tokenizer.json", "; copy it again from its source"
    document = read_table(path, DamagedError, what, flag="tokenizer", advice=advice)
    with checked_as(DamagedError, f"tokenizer {path}", what, advice):
        document["model"].get("type")
    check_tokenizer_model(path, document["model"])
    return document


def check_tokenizer_model(path: Path, model: dict[str, Any]) -> None:
    """Refuse by name what cannot be pruned.

    Raises:
        ConfigError: WordPiece, WordLevel and other models.
    """
    kind = model.get("type", "BPE" if "merges" in model else "?")
    if kind not in MODELS:
        raise ConfigError(
            f"tokenizer {path}: its model is {kind}; vocabularies of {' and '.join(MODELS)} "
            "models, SentencePiece and tiktoken can be pruned"
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ConfigError(
                f"tokenizer {path}: {name} {model[name]!r}; vocabularies that mark the ends of "
                "words inside of tokens cannot be pruned"
            )


def merge_pairs(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The two sides of each merge, which older files write as one string."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def _types(part: Any) -> set[str]:
    """The names of all components inside one part of a document."""
    if isinstance(part, list):
        return set().union(*map(_types, part))
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_types, part.values()))


class TokenizerJson:
    """See `emb_pruner.formats.Vocabulary`.

    Args:
        path: what a user named.
        document: of the tokenizer.json, or of what transformers makes of the directory without one.
        folder: the directory whose other files are the tokenizer's too; None for a file alone.
    """

    def __init__(self, path: Path, document: dict[str, Any], *, folder: Path | None = None) -> None:
        from tokenizers import Tokenizer

        self.path = path
        self.folder = folder
        self.document = document
        self.model = document["model"]
        self.is_unigram = self.model.get("type") == "Unigram"
        self.kind = "tokenizers Unigram" if self.is_unigram else "tokenizers BPE"
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(document))
        except BaseException as error:
            raise unreadable(path, error) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.ids: dict[str, int] = dict(self._tokenizer.get_vocab(with_added_tokens=True))
        self.tokens = {id: token for token, id in self.ids.items()}
        check_ids(path, self.ids)
        self.size = max(self.tokens) + 1
        self.is_byte_level = "ByteLevel" in _types(
            [document.get("pre_tokenizer"), document.get("decoder")]
        )
        # Unigram: see `emb_pruner.formats.sentencepiece`.
        self._has_words = not (self.is_unigram or self.is_byte_level) and not any(
            crosses_words(token) for token in self.tokens.values()
        )

    @cached_property
    def digest(self) -> str:
        loaded = load_tokenizer(self.path)
        if strange := sorted(loaded.vocab().items() ^ self.ids.items()):
            raise ConfigError(
                f"tokenizer {self.path}: its files disagree on {len(strange)} tokens, "
                f"{strange[0][0]!r} first; load it and save it again with transformers"
            )
        return loaded.digest

    @cached_property
    def forest(self) -> Forest:
        mandatory = self._mandatory()
        if self.is_unigram:
            parts: list[Parts | None] = [None] * self.size
            unmade, order = set[int](), list(map(float, range(self.size)))
        else:
            parts, unmade, order = self._merged(mandatory)
            if self.folder is not None:
                mandatory = merged_otherwise(self.folder, parts) | mandatory
        if self.model.get("ignore_merges"):  # a unit that is a token is that token
            unmade = set()
        holes = set(range(self.size)) - self.tokens.keys()
        texts = {id: self._text(token) for id, token in self.tokens.items()}
        tried = {
            id: text
            for id, text in texts.items()
            if text is not None and id not in mandatory and id not in unmade
        }
        dead = holes | unmade | never_found(self.encode, tried)
        return forest(parts=parts, order=order, mandatory=mandatory, dead=dead)

    def token(self, id: int) -> str:
        return self.tokens.get(id, "")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def units(self, text: str) -> list[str]:
        found: list[str] = []
        pieces = self._added_pattern.split(text) if self._added_pattern else [text]
        for place, piece in enumerate(pieces):
            if piece in self._added:
                found.append(piece)
            elif piece:
                found.extend(self._plain_units(piece, is_first=place == 0))
        return found

    def encode_units(self, units: Sequence[str]) -> list[list[int]]:
        tokenize, added = self._tokenizer.model.tokenize, self._added
        return [
            [added[unit]] if unit in added else [token.id for token in tokenize(unit)]
            for unit in units
        ]

    def write(self, plan: VocabPlan, directory: Path) -> list[str]:
        check_fits(plan, self.forest, self.digest, str(self.path))
        return write_files(self.files(plan), directory)

    def written(self, directory: Path) -> Path:
        return directory if self.folder is not None else directory / FILE

    def files(self, plan: VocabPlan) -> dict[str, bytes]:
        """Name -> content of what `write` writes; the plan is not checked."""
        text = dump_document(pruned_document(self.document, self.ids, plan))
        check_numbers(text, self.ids, plan)
        if self.folder is None:
            return {FILE: text.encode()}
        files = pruned_companions(self.folder, plan)
        if (self.folder / FILE).is_file():
            files[FILE] = text.encode()
        return files

    def _plain_units(self, text: str, *, is_first: bool) -> list[str]:
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        cut = self._tokenizer.pre_tokenizer if is_first else self._later_pre_tokenizer
        units = [text] if cut is None else [unit for unit, _ in cut.pre_tokenize_str(text)]
        return (
            [word for unit in units for word in WORDS.findall(unit)] if self._has_words else units
        )

    @cached_property
    def _later_pre_tokenizer(self) -> Any:
        """For what follows an added token: no space is put before it that stands only first."""
        from tokenizers import Tokenizer, models

        bare = json.loads(Tokenizer(models.BPE()).to_str())
        text = json.dumps(bare | {"pre_tokenizer": self.document.get("pre_tokenizer")})
        first, never = '"prepend_scheme": "first"', '"prepend_scheme": "never"'
        return Tokenizer.from_str(text.replace(first, never)).pre_tokenizer

    @cached_property
    def _added(self) -> dict[str, int]:
        return {
            token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    @cached_property
    def _added_pattern(self) -> re.Pattern[str] | None:
        """Splits a text at its added tokens, the longest first, and keeps them."""
        longest = sorted(self._added, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest))})") if longest else None

    def _text(self, token: str) -> str | None:
        """What the token spells; None where no text of its own is known."""
        if self.is_byte_level:
            return byte_level_text(token)
        return token.replace(SPACE, " ")

    def _mandatory(self) -> dict[int, str]:
        found: dict[int, str] = {}
        letters = letter_bytes() if self.is_byte_level else {}
        falls_back = bool(self.model.get("byte_fallback"))
        for token, id in self.ids.items():
            if token in letters or (falls_back and BYTE_TOKEN.fullmatch(token)):
                found[id] = "byte"
            elif not self.is_byte_level and len(token) == 1:
                found[id] = "character"
        if self.is_unigram:
            scores = [score for _, score in self.model["vocab"]]
            found.setdefault(scores.index(min(scores)), "least likely")  # sets the price of unk
            unknown = self.model.get("unk_id")
        else:
            unknown = self.ids.get(self.model.get("unk_token"))
        if unknown is not None:
            found[unknown] = "unknown"
        for id, added in self._tokenizer.get_added_tokens_decoder().items():
            found[id] = "special" if added.special else "added"
        if self.folder is not None:
            found = fixed_by_companions(self.folder, self.ids) | found
        return found

    def _merged(
        self, mandatory: dict[int, str]
    ) -> tuple[list[Parts | None], set[int], list[float]]:
        vocab: dict[str, int] = self.model["vocab"]
        rules: dict[tuple[int, int], tuple[float, int]] = {}
        order = [-1.0 if id in mandatory else float(id) for id in range(self.size)]
        for number, (left, right) in enumerate(merge_pairs(self.model)):
            rules[vocab[left], vocab[right]] = float(number), vocab[left + right]
        for place, made in sorted(rules.values(), reverse=True):
            order[made] = place
        atoms = {
            id: [vocab[letter] for letter in token]
            for token, id in vocab.items()
            if mandatory.get(id) not in ("special", "added", "unknown")
            and all(letter in vocab for letter in token)
        }
        parts, unmade = bpe_parts(atoms, lambda left, right: rules.get((left, right)), self.size)
        spelled = atoms.keys() | mandatory.keys()
        return parts, unmade | (set(vocab.values()) - spelled), order
