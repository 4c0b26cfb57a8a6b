"""Text to Megatron's .bin/.idx, which training here and stock Megatron-LM both read.

  megatron-prune preprocess --input corpus.jsonl --tokenizer-model llama --output-prefix corpus

The command takes JSON lines (.jsonl; .gz and .zst too), one document a line. For each key it writes
OUT_text_document.bin, .idx and a sidecar .json (tokenizer, counts, hashes); with --split-sentences
OUT_text_sentence, one sequence a sentence. The files are the same for any number of workers; they
appear whole or not at all.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from megatron_prune.data.corpus import (
    Encoder,
    check_inputs,
    map_pieces,
    parse_lines,
    read_chunks,
)
from megatron_prune.data.indexed import (
    SUFFIXES,
    CorpusWriter,
    claim_target,
    corpus_path,
    refuse_existing,
    token_dtype,
)
from megatron_prune.data.sentences import SentenceSplitter, load_splitter
from megatron_prune.data.sidecar import SIDECAR_VERSION
from megatron_prune.data.tokenizers import TextTokenizer, load_tokenizer
from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag
from megatron_prune.ranks import is_first_rank
from megatron_prune.stages.console import SILENT, Console, Progress

_UNKNOWN_SHARE_MAX = 0.5  # of the tokens; text that a tokenizer fits has none or a few


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    input: tuple[str, ...] = flag(".jsonl files, .gz and .zst too, in order", metavar="FILE")
    json_key: tuple[str, ...] = flag(
        "whose values to tokenise; a corpus of its own for each",
        default=("text",),
        metavar="KEY",
        also=("--json-keys",),
    )
    tokenizer_model: str = flag(
        "Hugging Face directory, tokenizer.json, SentencePiece .model, or a Megatron checkpoint of "
        "ours",
        metavar="PATH",
    )
    output_prefix: str = flag("OUT_KEY_document.bin and so on", metavar="OUT")
    workers: int = flag("processes that tokenise", default=1, metavar="N")
    append_eod: bool = flag("end each document with the EOS token", default=False)
    split_sentences: bool = flag("one sequence a sentence (nltk's Punkt)", default=False)
    overwrite: bool = flag("replace what is there, once the new is complete", default=False)
    dry_run: bool = flag("check, estimate, write nothing", default=False)


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What became of one key; with ``--dry-run`` an estimate, without documents.

    Attributes:
        prefix: of its files, as ``train --data-path`` takes it.
        told: the line that is shown.
    """

    prefix: str
    documents: int | None
    tokens: int
    bytes: int
    told: str


@dataclass(frozen=True, kw_only=True)
class Preprocessed:
    corpora: tuple[Corpus, ...]

    def __str__(self) -> str:
        return "\n".join(one.told for one in self.corpora)


def preprocess(options: PreprocessOptions, console: Console = SILENT) -> Preprocessed | None:
    """Tokenise; only the first of torchrun's ranks, if there are several, does anything.

    Raises:
        ConfigError: inputs, a tokenizer or a target that cannot be used; an empty corpus.
    """
    if not is_first_rank():
        return None
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # processes are counted by --workers, and by it alone
    )
    prefixes = _checked_prefixes(options)
    input_bytes = check_inputs(options.input)
    tokenizer = load_tokenizer(options.tokenizer_model)
    if options.append_eod and tokenizer.eod is None:
        raise ConfigError(
            f"--append-eod: {tokenizer.name} does not tell its EOS token; name the directory with "
            "its tokenizer_config.json"
        )
    encoder = Encoder(
        tokenizer=tokenizer,
        keys=options.json_key,
        dtype=token_dtype(tokenizer.vocab_size),
        eod=tokenizer.eod if options.append_eod else None,
    )
    if options.split_sentences:
        encoder = replace(encoder, splitter=_splitter(options, console))
    if options.dry_run:
        corpora = _estimate(options, encoder, prefixes, input_bytes)
        return Preprocessed(corpora=tuple(corpora))
    with _Signals() as signals, console.bar("preprocess", unit="B") as start:
        corpora = _write(options, encoder, prefixes, start(input_bytes), signals)
    return Preprocessed(corpora=tuple(corpora))


def _checked_prefixes(options: PreprocessOptions) -> dict[str, bool]:
    """A prefix for each key, and whether a corpus there may be replaced; or a refusal."""
    if options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: wanted 1 or more")
    level = "sentence" if options.split_sentences else "document"
    doubled = [
        key for key in options.json_key if options.json_key.count(key) > 1 or "/" in key or not key
    ]
    if doubled:
        raise ConfigError(
            f"--json-key {doubled[0]!r}: wanted different keys that can be part of a file name"
        )
    prefixes = [f"{options.output_prefix}_{key}_{level}" for key in options.json_key]
    inputs = {Path(path).resolve() for path in options.input}
    for prefix in prefixes:
        clash = [
            path for path in (corpus_path(prefix, s) for s in SUFFIXES) if path.resolve() in inputs
        ]
        if clash:
            raise ConfigError(
                f"{clash[0]} is an input and would be overwritten; choose another --output-prefix"
            )
    if options.dry_run:
        for prefix in prefixes:
            refuse_existing(prefix, overwrite=options.overwrite)
        return dict.fromkeys(prefixes, False)
    return {prefix: claim_target(prefix, overwrite=options.overwrite) for prefix in prefixes}


def _splitter(options: PreprocessOptions, console: Console) -> SentenceSplitter:
    texts = (
        text
        for chunk in read_chunks(options.input)
        for row in parse_lines(chunk, options.json_key)
        for text in row
    )
    splitter = load_splitter(texts)
    console.say(f"sentences: {splitter.origin}")
    return splitter


def _write(
    options: PreprocessOptions,
    encoder: Encoder,
    prefixes: dict[str, bool],
    progress: Progress,
    signals: _Signals,
) -> list[Corpus]:
    start = time.monotonic()
    with ExitStack() as stack:
        with signals.held():
            writers = [
                stack.enter_context(CorpusWriter(prefix, encoder.dtype, overwrite=overwrite))
                for prefix, overwrite in prefixes.items()
            ]
        unknown = _fill(writers, options, encoder, progress)
        for writer, key, count in zip(writers, options.json_key, unknown, strict=True):
            if writer.tokens == 0:
                raise ConfigError(
                    f"empty corpus: {writer.documents} documents and not one token under {key!r} "
                    f"in {', '.join(options.input)}"
                )
            if count > _UNKNOWN_SHARE_MAX * writer.tokens:
                raise ConfigError(
                    f"{count} of the {writer.tokens} tokens under {key!r} are unknown (id "
                    f"{encoder.tokenizer.unknown} of {encoder.tokenizer.name}): it does not know "
                    "this script; give the tokenizer of a model that was trained on such text"
                )
        sidecars = [writer.prepare(_facts(encoder)) for writer in writers]
        with signals.held():
            for writer in writers:
                writer.publish()
    seconds = time.monotonic() - start
    return [
        _written(prefix, sidecar, seconds)
        for prefix, sidecar in zip(prefixes, sidecars, strict=True)
    ]


def _written(prefix: str, sidecar: dict[str, Any], seconds: float) -> Corpus:
    documents, tokens = sidecar["documents"], sidecar["tokens"]
    written = sidecar["bin"]["bytes"] + sidecar["idx"]["bytes"]
    told = f"{documents} documents, {tokens} tokens, {written} bytes, {seconds:.1f} seconds"
    return Corpus(
        prefix=prefix, documents=documents, tokens=tokens, bytes=written, told=f"{prefix}: {told}"
    )


def _fill(
    writers: list[CorpusWriter], options: PreprocessOptions, encoder: Encoder, progress: Progress
) -> list[int]:
    """Write all documents; how many tokens the tokenizer did not know, of each writer."""
    start = time.monotonic()
    unknown = [0] * len(writers)
    for chunk, by_key in map_pieces(read_chunks(options.input), encoder, options.workers):
        for i, (writer, documents) in enumerate(zip(writers, by_key, strict=True)):
            writer.add(documents.tokens, documents.lengths, documents.sequences_per_document)
            if encoder.tokenizer.unknown is not None:
                unknown[i] += int((documents.tokens == encoder.tokenizer.unknown).sum())
        seconds = max(time.monotonic() - start, 1e-9)
        tokens = sum(writer.tokens for writer in writers)
        rates = f"{writers[0].documents / seconds:.0f} documents/s, "
        progress(chunk.file_bytes, f"{rates}{tokens / seconds / 1e6:.2f}M tokens/s")
    return unknown


def _facts(encoder: Encoder) -> dict[str, object]:
    """The part of the sidecar that the files themselves do not tell."""
    tokenizer: TextTokenizer = encoder.tokenizer
    return {
        "version": SIDECAR_VERSION,
        "tokenizer": tokenizer.name,
        "tokenizer_digest": tokenizer.digest,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "eod_appended": encoder.eod is not None,
        "sentences": encoder.splitter.origin if encoder.splitter else None,
    }


def _estimate(
    options: PreprocessOptions, encoder: Encoder, prefixes: dict[str, bool], input_bytes: int
) -> list[Corpus]:
    """Tokenise the first chunk and tell what the whole would be."""
    chunks = list(islice(read_chunks(options.input), 1))
    seen = sum(chunk.file_bytes for chunk in chunks)
    by_key, found = [encoder(chunk) for chunk in chunks], []
    for i, prefix in enumerate(prefixes):
        tokens = sum(documents[i].tokens.size for documents in by_key)
        if tokens == 0:
            raise ConfigError(
                f"empty corpus: no token under {options.json_key[i]!r} at the beginning of "
                f"{options.input[0]}"
            )
        total = round(tokens * input_bytes / seen)
        size = total * encoder.dtype.itemsize
        told = (
            f"would write {prefix}.bin, .idx, .json: about {total} tokens, {size} bytes of "
            f"{encoder.dtype}, from {input_bytes} bytes of text with {encoder.tokenizer.name} "
            f"({encoder.tokenizer.vocab_size} tokens)"
        )
        found.append(Corpus(prefix=prefix, documents=None, tokens=total, bytes=size, told=told))
    return found


class _Signals:
    """SIGTERM and Ctrl-C end the command as errors do, so that temporary files are removed.

    Not at any instant, though: they wait between a file's making and its registration for removal,
    and between the renames.
    """

    def __init__(self) -> None:
        self._held = False
        self._waiting: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._waiting is not None:
            self._leave(self._waiting)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._held:
            self._waiting = number
        else:
            self._leave(number)

    def _leave(self, number: int) -> NoReturn:
        self._held = True  # a second signal does not interrupt the cleaning up
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
