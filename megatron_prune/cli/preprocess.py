"""Text to Megatron's .bin/.idx, which training here and stock Megatron-LM both read.

Takes JSON lines (.jsonl; .gz and .zst too), one document a line. Writes OUT_text_document.bin, .idx
and a sidecar .json (tokenizer, counts, hashes) for each key; with --split-sentences
OUT_text_sentence, one sequence a sentence. The files are the same for any number of workers; they
appear whole or not at all.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tqdm import tqdm

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
from megatron_prune.ranks import is_first_rank

_UNKNOWN_SHARE_MAX = 0.5  # of the tokens; text that a tokenizer fits has none or a few


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl files, .gz and .zst too, in order",
    )
    parser.add_argument(
        "--json-key",
        "--json-keys",
        dest="json_keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="whose values to tokenise; a corpus of its own for each (default: text)",
    )
    parser.add_argument(
        "--tokenizer-model",
        required=True,
        metavar="PATH",
        help="Hugging Face directory, tokenizer.json, SentencePiece .model, or a Megatron "
        "checkpoint of ours",
    )
    parser.add_argument(
        "--output-prefix", required=True, metavar="OUT", help="OUT_KEY_document.bin and so on"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)"
    )
    parser.add_argument(
        "--append-eod", action="store_true", help="end each document with the EOS token"
    )
    parser.add_argument(
        "--split-sentences", action="store_true", help="one sequence a sentence (nltk's Punkt)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there, once the new is complete"
    )
    parser.add_argument("--dry-run", action="store_true", help="check, estimate, write nothing")


def run(args: argparse.Namespace) -> None:
    """Tokenise; only the first of torchrun's ranks, if there are several, does anything."""
    if not is_first_rank():
        return
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # processes are counted by --workers, and by it alone
    )
    prefixes = _checked_prefixes(args)
    input_bytes = check_inputs(args.input)
    tokenizer = load_tokenizer(args.tokenizer_model)
    if args.append_eod and tokenizer.eod is None:
        raise ConfigError(
            f"--append-eod: {tokenizer.name} does not tell its EOS token; name the directory with "
            "its tokenizer_config.json"
        )
    encoder = Encoder(
        tokenizer=tokenizer,
        keys=tuple(args.json_keys),
        dtype=token_dtype(tokenizer.vocab_size),
        eod=tokenizer.eod if args.append_eod else None,
    )
    if args.split_sentences:
        encoder = replace(encoder, splitter=_splitter(args))
    if args.dry_run:
        _estimate(args, encoder, prefixes, input_bytes)
        return
    with _Signals() as signals:
        _write(args, encoder, prefixes, input_bytes, signals)


def _checked_prefixes(args: argparse.Namespace) -> dict[str, bool]:
    """A prefix for each key, and whether a corpus there may be replaced; or a refusal."""
    if args.workers < 1:
        raise ConfigError(f"--workers {args.workers}: wanted 1 or more")
    level = "sentence" if args.split_sentences else "document"
    doubled = [
        key for key in args.json_keys if args.json_keys.count(key) > 1 or "/" in key or not key
    ]
    if doubled:
        raise ConfigError(
            f"--json-key {doubled[0]!r}: wanted different keys that can be part of a file name"
        )
    prefixes = [f"{args.output_prefix}_{key}_{level}" for key in args.json_keys]
    inputs = {Path(path).resolve() for path in args.input}
    for prefix in prefixes:
        clash = [
            path for path in (corpus_path(prefix, s) for s in SUFFIXES) if path.resolve() in inputs
        ]
        if clash:
            raise ConfigError(
                f"{clash[0]} is an input and would be overwritten; choose another --output-prefix"
            )
    if args.dry_run:
        for prefix in prefixes:
            refuse_existing(prefix, overwrite=args.overwrite)
        return dict.fromkeys(prefixes, False)
    return {prefix: claim_target(prefix, overwrite=args.overwrite) for prefix in prefixes}


def _splitter(args: argparse.Namespace) -> SentenceSplitter:
    texts = (
        text
        for chunk in read_chunks(args.input)
        for row in parse_lines(chunk, args.json_keys)
        for text in row
    )
    splitter = load_splitter(texts)
    print(f"sentences: {splitter.origin}", file=sys.stderr)
    return splitter


def _write(
    args: argparse.Namespace,
    encoder: Encoder,
    prefixes: dict[str, bool],
    input_bytes: int,
    signals: _Signals,
) -> None:
    start = time.monotonic()
    with ExitStack() as stack:
        with signals.held():
            writers = [
                stack.enter_context(CorpusWriter(prefix, encoder.dtype, overwrite=overwrite))
                for prefix, overwrite in prefixes.items()
            ]
        unknown = _fill(writers, args, encoder, input_bytes)
        for writer, key, count in zip(writers, args.json_keys, unknown, strict=True):
            if writer.tokens == 0:
                raise ConfigError(
                    f"empty corpus: {writer.documents} documents and not one token under {key!r} "
                    f"in {', '.join(args.input)}"
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
    for prefix, sidecar in zip(prefixes, sidecars, strict=True):
        written = sidecar["bin"]["bytes"] + sidecar["idx"]["bytes"]
        print(
            f"{prefix}: {sidecar['documents']} documents, {sidecar['tokens']} tokens, {written} "
            f"bytes, {seconds:.1f} seconds"
        )


def _fill(
    writers: list[CorpusWriter], args: argparse.Namespace, encoder: Encoder, input_bytes: int
) -> list[int]:
    """Write all documents; how many tokens the tokenizer did not know, of each writer."""
    start = time.monotonic()
    unknown = [0] * len(writers)
    bar = tqdm(
        total=input_bytes,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc="preprocess",
        mininterval=0.5,
    )
    with bar:
        for chunk, by_key in map_pieces(read_chunks(args.input), encoder, args.workers):
            for i, (writer, documents) in enumerate(zip(writers, by_key, strict=True)):
                writer.add(documents.tokens, documents.lengths, documents.sequences_per_document)
                if encoder.tokenizer.unknown is not None:
                    unknown[i] += int((documents.tokens == encoder.tokenizer.unknown).sum())
            seconds = max(time.monotonic() - start, 1e-9)
            tokens = sum(writer.tokens for writer in writers)
            rates = f"{writers[0].documents / seconds:.0f} documents/s, "
            rates += f"{tokens / seconds / 1e6:.2f}M tokens/s"
            bar.set_postfix_str(rates, refresh=False)
            bar.update(chunk.file_bytes)
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
    args: argparse.Namespace, encoder: Encoder, prefixes: dict[str, bool], input_bytes: int
) -> None:
    """Tokenise the first chunk and tell what the whole would be."""
    chunks = list(islice(read_chunks(args.input), 1))
    seen = sum(chunk.file_bytes for chunk in chunks)
    by_key = [encoder(chunk) for chunk in chunks]
    for i, prefix in enumerate(prefixes):
        tokens = sum(documents[i].tokens.size for documents in by_key)
        if tokens == 0:
            raise ConfigError(
                f"empty corpus: no token under {args.json_keys[i]!r} at the beginning of "
                f"{args.input[0]}"
            )
        total = round(tokens * input_bytes / seen)
        print(
            f"would write {prefix}.bin, .idx, .json: about {total} tokens, "
            f"{total * encoder.dtype.itemsize} bytes of "
            f"{encoder.dtype}, from {input_bytes} bytes of text with {encoder.tokenizer.name} "
            f"({encoder.tokenizer.vocab_size} tokens)"
        )


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
