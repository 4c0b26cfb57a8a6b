"""Load a tokenizer from wherever one lies, as one small object that survives being sent to workers.

A tokenizer is a Hugging Face directory, a ``tokenizer.json``, a SentencePiece ``*.model``, or one
of our Megatron checkpoints, which carry the files of their tokenizer in ``iter_XXXXXXX/hf``. Only
local files are read, and no code of a model's author is run. Anything else is refused before any
text is read.

The ids are those of ``AutoTokenizer.from_pretrained(path)(text)``. Where transformers only passes
on to a ``tokenizers`` backend (seen by comparing the two on ``PROBE``), the backend alone is kept:
a worker then starts in 0.1 s instead of the 2.4 s that importing transformers takes.

A bare SentencePiece file adds its BOS as the default special token, like Llama's tokenizer in
Megatron-LM and in transformers, if it has one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_prune.errors import ConfigError, DamagedError, PruneError
from megatron_prune.families import FAMILIES, on_disk
from megatron_prune.files.contents import foreign_text
from megatron_prune.files.parsing import read_json, read_table

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import Tokenizer

TRACKER = "latest_checkpointed_iteration.txt"
# words, numbers, code, indentation, accents, a script without spaces, a character of four bytes
PROBE = (
    "The  quick brown fox's 12,345.67 naïve cafés\n\tdef f(x_1):\n        return x**2  # 你好 🙂\n"
)
_MOST_HOLES = 100_000  # ids without a token
_SIGNS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


class _Backend(Protocol):
    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def vocab(self) -> dict[str, int]: ...


class _Fast:
    """A ``tokenizers.Tokenizer``."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        found = self._tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))


class _SentencePiece:
    """A ``SentencePieceProcessor``."""

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        bos = (
            [self._processor.bos_id()]
            if add_special_tokens and self._processor.bos_id() >= 0
            else []
        )
        return [bos + self._processor.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def vocab(self) -> dict[str, int]:
        return {self._processor.id_to_piece(i): i for i in range(self._processor.vocab_size())}


class _Python:
    """A transformers tokenizer that is more than its backend, or has none."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        found = self._tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
        return [list(ids) for ids in found["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    def vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())


class TextTokenizer:
    """Text to ids and back.

    Attributes:
        name: where it was loaded from, for messages.
        vocab_size: number of tokens, added ones included.
        eod: id that ends a document (the model's EOS), None where the files do not tell.
        unknown: id that stands for all it has no token for, None where every text has its own.
        digest: sha256 of what every id stands for. The same for a SentencePiece file and for the
            Hugging Face files made of it, in whatever version of transformers; deaf to the roles of
            special tokens (a base model's corpus fits its chat model) and to merge rules.
    """

    def __init__(
        self, backend: _Backend, *, name: str, eod: int | None, unknown: int | None
    ) -> None:
        vocab = backend.vocab()
        self._backend = backend
        self.name = name
        self.eod = eod
        # GPT-2's files call one token both, and its bytes leave nothing unknown
        self.unknown = None if unknown == eod else unknown
        self.vocab_size = len(vocab)
        self.digest = vocabulary_digest(vocab)

    def vocab(self) -> dict[str, int]:
        """Token -> id, added ones included."""
        return self._backend.vocab()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """The ids of ``text``, tokenised in one piece."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        """The ids of each text by itself."""
        return self._backend.encode_batch(texts, add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids`` as it is: no cleaning up of spaces, special tokens kept."""
        return self._backend.decode(ids)


def vocabulary_digest(vocab: Mapping[str, int]) -> str:
    """See `TextTokenizer`; of token -> id."""
    by_id = sorted((number, token) for token, number in vocab.items())
    return hashlib.sha256(json.dumps(by_id, separators=(",", ":")).encode()).hexdigest()


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer at ``path``; see the module for what a path may be.

    Raises:
        ConfigError: nothing there, not a tokenizer, or one that needs code of its own.
        DamagedError: a tokenizer's file that cannot be read as one.
    """
    path = Path(path)
    if path.is_file():
        return _from_file(path)
    folder = tokenizer_directory(path)
    if not any((folder / sign).is_file() for sign in _SIGNS):
        raise ConfigError(
            f"tokenizer {path}: no tokenizer files in {folder}; wanted one of {', '.join(_SIGNS)}"
        )
    described = any(
        (folder / sign).is_file() for sign in ("tokenizer.json", "tokenizer_config.json")
    )
    if not described and (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model")
    return _from_transformers(folder)


def tokenizer_directory(path: Path) -> Path:
    """Where a Megatron checkpoint has its tokenizer's files; other directories: ``path``.

    Raises:
        ConfigError: not a directory, or a checkpoint without a tokenizer.
    """
    if not path.is_dir():
        raise ConfigError(
            f"tokenizer {path}: no such file or directory; wanted a Hugging Face directory, a "
            "tokenizer.json, a SentencePiece .model file or a Megatron checkpoint written by "
            "convert"
        )
    tracker = path / TRACKER
    if not tracker.is_file():
        return path / "hf" if (path / "hf").is_dir() else path
    word = tracker.read_text(errors="replace").strip()
    if word != "release" and not word.isdecimal():
        raise ConfigError(
            f"{tracker}: found {word[:40]!r}, wanted an iteration number or 'release'"
        )
    folder = path / ("release" if word == "release" else f"iter_{int(word):07d}") / "hf"
    if not folder.is_dir():
        raise ConfigError(
            f"tokenizer {path}: this Megatron checkpoint has no {folder.relative_to(path)}, so it "
            "does not carry its tokenizer; name the model's Hugging Face directory instead"
        )
    return folder


def _from_file(path: Path) -> TextTokenizer:
    if path.suffix == ".model":
        return _from_sentencepiece(path)
    if path.suffix != ".json":
        raise ConfigError(
            f"tokenizer {path}: wanted a tokenizer.json, a SentencePiece .model or a directory"
        )
    if path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        return _from_transformers(path.parent)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
        check_ids(path, tokenizer.get_vocab(with_added_tokens=True))
    except BaseException as error:
        raise unreadable(path, error) from None
    model = json.loads(tokenizer.to_str())["model"]
    token, unknown = model.get("unk_token"), model.get("unk_id")  # Unigram has the id
    if token is not None:
        unknown = tokenizer.token_to_id(token)
    return TextTokenizer(_Fast(tokenizer), name=str(path), eod=None, unknown=unknown)


def _from_sentencepiece(path: Path) -> TextTokenizer:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(path.read_bytes())
        eod = processor.eos_id()
        return TextTokenizer(
            _SentencePiece(processor),
            name=str(path),
            eod=eod if eod >= 0 else None,
            unknown=processor.unk_id(),
        )
    except (
        RuntimeError,
        ValueError,
    ) as error:  # ValueError: a message or a piece that is not UTF-8
        raise unreadable(path, error) from None


def transformers_tokenizer(path: Path) -> Any:
    """Transformers' own tokenizer of a directory or a Megatron checkpoint, with its chat template.

    Raises:
        ConfigError, DamagedError: see `load_tokenizer`.
    """
    if not path.is_dir():
        raise ConfigError(
            f"tokenizer {path}: wanted the directory of a model; a single file has no chat template"
        )
    return _read_by_transformers(tokenizer_directory(path))


def document_by_transformers(folder: Path) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of a directory without one.

    Raises:
        ConfigError: it has no form for `tokenizers`; others: see `load_tokenizer`.
    """
    tokenizer = _read_by_transformers(folder)
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer {folder}: transformers reads it with {type(tokenizer).__name__}, which has "
            "no tokenizer.json; name its SentencePiece .model file instead"
        )
    return dict(json.loads(tokenizer.backend_tokenizer.to_str()))


def chat_tokenizer(path: Path) -> Any:
    """`transformers_tokenizer` with a chat template that needs no name.

    Raises:
        ConfigError, DamagedError: it has none; see `transformers_tokenizer`.
    """
    tokenizer = transformers_tokenizer(path)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ConfigError(
            f"--apply-chat-template: the tokenizer of {path} has no chat template; leave it out, "
            "or give a tokenizer that has one with --tokenizer-model"
        )
    return tokenizer


def _read_by_transformers(folder: Path) -> Any:
    from transformers import AutoConfig, AutoTokenizer

    try:
        # Only the model's type decides how its tokenizer is read. Its sizes, which transformers
        # would check by rules of its own, are none of a tokenizer's business.
        kind = _model_type(folder)
        return AutoTokenizer.from_pretrained(
            str(folder),
            config=None if kind is None else AutoConfig.for_model(kind),
            trust_remote_code=False,
            local_files_only=True,
        )
    except BaseException as error:
        raise unreadable(folder, error) from None


def _from_transformers(folder: Path) -> TextTokenizer:
    tokenizer = _read_by_transformers(folder)
    backend: _Backend = _Python(tokenizer)
    try:
        check_ids(folder, tokenizer.get_vocab())
        if tokenizer.is_fast:
            from tokenizers import Tokenizer

            alone, end = (
                Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
                tokenizer.eos_token,
            )
            if _do_the_same(_Fast(alone), backend, [PROBE, PROBE + (end or "") + PROBE, ""]):
                backend = _Fast(alone)
        return TextTokenizer(
            backend,
            name=str(folder),
            eod=tokenizer.eos_token_id,
            unknown=getattr(tokenizer, "unk_token_id", None),
        )
    except BaseException as error:  # configured so that it fails on every text
        raise unreadable(folder, error) from None


def _model_type(folder: Path) -> str | None:
    """``model_type`` of a directory's config.json, where it has one.

    A type that transformers does not know by itself is that of the family it is read as.
    """
    path = folder / "config.json"
    told = read_table(path, ConfigError, "not a model configuration") if path.is_file() else {}
    kind = told.get("model_type")
    if (family := on_disk(kind)) is not None:
        return FAMILIES[family.name].model_type
    return kind if isinstance(kind, str) else None


def check_ids(path: Path, vocab: Mapping[str, int]) -> None:
    """Refuse ids far beyond the number of tokens: `tokenizers` writes its model down id by id, and
    lists here are as long as the largest.

    Raises:
        DamagedError: with both numbers; also for no token at all.
    """
    size = max(vocab.values(), default=-1) + 1
    if not 0 < size <= 2 * len(vocab) + _MOST_HOLES:
        raise DamagedError(
            f"tokenizer {path}: {len(vocab)} tokens with ids up to {size - 1}; copy it again from "
            "its source"
        )


def _do_the_same(left: _Backend, right: _Backend, texts: Sequence[str]) -> bool:
    ids = [
        backend.encode_batch(texts, special)
        for special in (True, False)
        for backend in (left, right)
    ]
    pieces = [ids[2][0], ids[2][0][1:]]
    return (
        ids[0] == ids[1]
        and ids[2] == ids[3]
        and all(left.decode(x) == right.decode(x) for x in pieces)
    )


def unreadable(path: Path, error: BaseException) -> BaseException:
    """Our error for what a tokenizer library raised.

    Rust's panics are BaseExceptions, as Ctrl-C is.
    """
    is_panic = type(error).__name__ == "PanicException"
    if isinstance(error, PruneError) or not (is_panic or isinstance(error, Exception)):
        return error
    said = " ".join(str(error).split())[:200]
    if path.is_file() and (what := no_tokenizer(path)):
        return ConfigError(f"tokenizer {path}: {what}")
    if "trust_remote_code" in said:
        return ConfigError(f"tokenizer {path}: it needs code of its author, which is never run")
    return DamagedError(f"tokenizer {path}: cannot be read ({said}); copy it again from its source")


def no_tokenizer(path: Path) -> str | None:
    """What a file is that was given for a tokenizer's; None where it looks like one."""
    if what := foreign_text(path):
        return what
    if path.suffix != ".json":
        return None
    try:
        values = read_json(path, ConfigError)
    except ConfigError:  # it may be a damaged one
        return None
    if isinstance(values, dict) and "model" in values:
        return None
    return "is JSON, but no tokenizer.json; give that, or the directory that it lies in"
