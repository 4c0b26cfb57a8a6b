"""Where a text may be cut so that its pieces encode to the ids that the whole encodes to.

Words repeat, so a corpus is counted fast by cutting it into short pieces, and encoding each
different one once. That is exact only at places which every token of every text respects:

- Byte-level pretokenisers of the GPT-2 kind never join a character with a space behind it, nor an
  ASCII letter or digit with what follows and is neither letter, digit nor apostrophe; of several
  blanks the last one goes to the word. Their patterns look at nothing that lies behind them.
- Without a pretokeniser, a vocabulary that has no token with ``▁`` behind another character cannot
  merge over the start of a word.

Everything else (other patterns and normalisers, Unigram models that add up scores over a whole
text, added tokens with spaces or that strip them) is encoded in one piece. So is a text in which an
added token is spelled out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from emb_pruner.formats import Vocabulary
from emb_pruner.formats.sentencepiece import SentencePiece
from emb_pruner.formats.spelling import SPACE, crosses_words
from emb_pruner.formats.tiktoken import Tiktoken
from emb_pruner.formats.tokenizer_json import TokenizerJson

_MARKS = r"!-/:-@\[-`{-~"  # ASCII's printable characters that are no letters or digits
_BYTE_LEVEL_PIECES = re.compile(
    # a word with the marks before it, when nothing follows that could belong to it
    rf" ?[{_MARKS}]*[A-Za-z0-9]+(?![A-Za-z0-9'\u0080-\U0010ffff])"
    # the end of a line; blanks up to the one that goes to the next word
    rf"|\n(?=\S)|\s+(?= [{_MARKS}A-Za-z])"
    # anything up to the next word
    rf"| ?(?:[^ ]| (?!\S)|(?<=\s) (?![{_MARKS}A-Za-z]))+"
)
_BYTE_LEVEL_UNIT = re.compile(r" ?[A-Z]?[a-z]+")
_BYTE_LEVEL_BORDER = re.compile(r"(?<=\S)(?= \S)")
_WORD_START = re.compile(rf"(?<=[^\s{SPACE}])(?= [^\s{SPACE}])")
_WORD_SPACE = re.compile(rf"(?<=[^\s{SPACE}]) (?=[^\s{SPACE}])")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _LINES, _BLANKS = r"[^\r\n\p{L}\p{N}]?", r"\s*[\r\n]+", r"\s+(?!\S)|\s+"
_LETTERS = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SIGNS_O200K = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
PATTERNS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # cl100k and Llama 3, Qwen 1 to 3
        rf"{_LETTERS}|\p{{N}}{{1,3}}|{_SIGNS}|{_LINES}|{_BLANKS}",
        rf"{_LETTERS}|\p{{N}}|{_SIGNS}|{_LINES}|{_BLANKS}",
        # o200k, Mistral's Tekken
        rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
        rf"|\p{{N}}{{1,3}}|{_SIGNS_O200K}|{_LINES}|{_BLANKS}",
        rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*"
        rf"|\p{{N}}|{_SIGNS_O200K}|{_LINES}|{_BLANKS}",
    }
)


@dataclass(frozen=True, kw_only=True)
class Cutter:
    """Cuts texts for one tokenizer.

    Attributes:
        cut: a text without added tokens -> its pieces; None: texts cannot be cut.
        border: where long texts can be cut, what it matches is left out; None as above.
        added: spellings of the added tokens.
        unit: pieces that are one unit each, a space in front spelled ``Ġ``; encoding units costs a
            third of encoding texts.
    """

    cut: Callable[[str], list[str]] | None = None
    border: re.Pattern[str] | None = None
    added: tuple[str, ...] = ()
    unit: re.Pattern[str] | None = None

    def pieces(self, text: str) -> Sequence[str]:
        """What can be encoded one by one in place of the text."""
        if self.cut is None or (self._added and self._added.search(text)):
            return [text]
        return self.cut(text)

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        return re.compile("|".join(map(re.escape, self.added))) if self.added else None

    def last_border(self, text: str) -> tuple[int, int] | None:
        """The last place to cut a text of which more follows: end of one part, start of the next.

        It is not beside an added token, which might take the space or be given another one.
        """
        if self.border is None:
            return None
        width = 1 << 12
        while True:
            start = max(len(text) - width, 0)
            found = list(self.border.finditer(text, start))
            for match in reversed(found):
                left, right = match.span()
                if not text.endswith(self.added, 0, left) and not text.startswith(
                    self.added, right
                ):
                    return left, right
            if start == 0:
                return None
            width *= 16


WHOLE = Cutter()


def cutter_for(vocabulary: Vocabulary) -> Cutter:
    """How texts can be cut for a tokenizer."""
    if isinstance(vocabulary, TokenizerJson):
        return of_tokenizer_json(vocabulary.document)
    if isinstance(vocabulary, SentencePiece):
        return of_sentencepiece(vocabulary.proto)
    if isinstance(vocabulary, Tiktoken):
        family = vocabulary.family
        return of_tiktoken(family.pattern, family.specials, family.normal_form)
    return WHOLE


def _byte_level(added: Iterable[str]) -> Cutter:
    return Cutter(cut=_BYTE_LEVEL_PIECES.findall, border=_BYTE_LEVEL_BORDER, added=tuple(added))


def _words(border: re.Pattern[str], added: Iterable[str]) -> Cutter:
    return Cutter(cut=border.split, border=border, added=tuple(added))


def of_tokenizer_json(document: Mapping[str, Any]) -> Cutter:
    """From a tokenizer.json."""
    tokens = document.get("added_tokens") or []
    added = [token["content"] for token in tokens]
    normalizers, splitters = _steps(document, "normalizer"), _steps(document, "pre_tokenizer")
    strips = any(token[flag] for token in tokens for flag in ("lstrip", "rstrip", "single_word"))
    if strips or any(SPACE in text or re.search(r"\s|^$", text) for text in added):
        return WHOLE
    if _is_gpt2_like(splitters) and all(step == {"type": "NFC"} for step in normalizers):
        sought = [token["content"] for token in tokens if token["normalized"]]
        if normalizers and _may_be_composed(sought):
            return WHOLE
        of_letters = any(text.isalpha() for text in added)  # might be taken for a word
        return replace(_byte_level(added), unit=None if of_letters else _BYTE_LEVEL_UNIT)
    model = document["model"]
    if model.get("type", "BPE") != "BPE" or any(map(crosses_words, model["vocab"])):
        return WHOLE
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if normalizers == [{"type": "Prepend", "prepend": SPACE}, spaces] and not splitters:
        return _words(_WORD_SPACE, added)
    if normalizers == [spaces] and not splitters:
        return _words(_WORD_START, added)
    if not normalizers and [step["type"] for step in splitters] == ["Metaspace"]:
        return _words(_WORD_START, added) if splitters[0]["replacement"] == SPACE else WHOLE
    return WHOLE


def of_sentencepiece(model: Any) -> Cutter:
    """From a SentencePiece ``ModelProto``."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    plain = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    if (
        trainer.model_type != trainer.BPE
        or trainer.treat_whitespace_as_suffix
        or not (plain and normalizer.escape_whitespaces)
        or any(crosses_words(piece.piece) for piece in model.pieces)
    ):
        return WHOLE
    return _words(_WORD_SPACE if normalizer.add_dummy_prefix else _WORD_START, ())


def of_tiktoken(pattern: str, added: Iterable[str], normal_form: str | None = None) -> Cutter:
    """From the pattern of an ``Encoding``, its special tokens, and what is done before."""
    added = list(added)
    if pattern not in PATTERNS or any(re.search(r"\s|^$", text) for text in added):
        return WHOLE
    if normal_form is not None and (normal_form != "NFC" or _may_be_composed(added)):
        return WHOLE
    return _byte_level(added)


def _may_be_composed(added: Iterable[str]) -> bool:
    """NFC may make one of them of a text that does not spell it out.

    Of ASCII only ``K``, ``;`` and a backtick stand in the place of other characters.
    """
    return any(not token.isascii() or set(token) & set("K;`") for token in added)


def _steps(document: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """A normaliser or pretokeniser as the list of what it does in turn."""
    step = document.get(part)
    if step is None:
        return []
    if step["type"] == "Sequence":
        return list(step["normalizers" if part == "normalizer" else "pretokenizers"])
    return [step]


def _is_gpt2_like(splitters: Sequence[Mapping[str, Any]]) -> bool:
    """Only steps whose cuts are known, and one of them cuts words."""
    cuts_words = False
    for step in splitters:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts_words |= step.get("use_regex", True)
        elif step["type"] == "Split" and step["pattern"].get("Regex") in PATTERNS:
            kind = step["behavior"], step["invert"]
            if kind not in (("Isolated", False), ("Removed", True)):
                return False
            cuts_words = True
        elif step["type"] != "Digits":
            return False
    return cuts_words
