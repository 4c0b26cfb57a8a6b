"""A corpus as pieces of work for counting: text files, JSON lines, Megatron's token files.

A text file is one document, read as UTF-8 and cut into blocks where its tokenizer allows it; where
it does not, the whole of it is one block. Of JSON lines each is a document. ``.gz`` and ``.zst``
are read as they are. Token files (``.bin`` with ``.idx``) hold ids already.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from emb_pruner.cutting import Cutter
from megatron_prune.data.corpus import LineChunk, check_inputs, parse_lines, read_chunks
from megatron_prune.data.indexed import corpus_path
from megatron_prune.data.packed import open_unpacked, without_packing
from megatron_prune.data.sidecar import CorpusFacts, check_corpus
from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import np

TEXT_BLOCK_BYTES = 1 << 20
TEXT_BYTES_MAX = 1 << 30  # of a text without a place to cut it
IDS = 1 << 20  # tokens of a token file at a time
_KIND_OF = {".txt": "txt", ".jsonl": "jsonl", ".bin": "bin", ".idx": "bin"}


@dataclass(frozen=True, kw_only=True)
class TextBlock:
    """A part of a text file.

    ``spaces`` were left out where it was cut off; ``documents`` is 1 at the start of a file.
    ``file_bytes`` as in `LineChunk`.
    """

    text: str
    spaces: int
    documents: int
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ids:
    """``count`` tokens from ``start`` on of the corpus at ``prefix``."""

    prefix: str
    dtype: str
    start: int
    count: int
    documents: int
    file_bytes: int


Portion = LineChunk | TextBlock | Ids


@dataclass(frozen=True, kw_only=True)
class Input:
    """One input: its kind, and for token files what they are."""

    path: Path
    kind: str
    file_bytes: int
    facts: CorpusFacts | None = None


def check_corpora(
    paths: Sequence[Path], kind: str | None, tokenizer_digest: str, vocab_size: int
) -> list[Input]:
    """What lies at the paths; a token file is checked against itself and the tokenizer.

    Args:
        paths: files; of a token file either one or the prefix of both.
        kind: of all of them; None: by their names.

    Raises:
        ConfigError: missing, of no kind that is known, ids of another tokenizer, or named twice.
        DamagedError: a token file that is not whole.
    """
    found: list[Input] = []
    for path in paths:
        its = kind or _kind(path)
        facts = None
        if its == "bin":
            path = path.with_suffix("") if _KIND_OF.get(path.suffix) == "bin" else path
            facts = check_corpus(path, tokenizer_digest, vocab_size, to_learn_from=False)
            size = corpus_path(path, ".bin").stat().st_size
        else:
            size = check_inputs([path])
        if any(path.resolve() == other.path.resolve() for other in found):
            raise ConfigError(f"--input {path}: named twice; its tokens would count twice")
        found.append(Input(path=path, kind=its, file_bytes=size, facts=facts))
    return found


def _kind(path: Path) -> str:
    if known := _KIND_OF.get(without_packing(path).suffix):
        return known
    if corpus_path(path, ".idx").is_file():
        return "bin"
    if not path.exists():
        raise ConfigError(f"--input {path}: No such file or directory")
    raise ConfigError(
        f"--input {path}: wanted .txt, .jsonl (.gz and .zst too), or .bin with .idx; "
        "--input-kind says what files of other names are"
    )


def check_texts(paths: Sequence[Path], flag: str) -> list[Input]:
    """Files of text: JSON lines by their name, all others plain.

    Raises:
        ConfigError: missing, not readable, or token ids.
    """
    found = []
    for path in paths:
        kind = _KIND_OF.get(without_packing(path).suffix, "txt")
        if kind == "bin":
            raise ConfigError(f"{flag} {path}: token ids; wanted text or .jsonl (.gz and .zst too)")
        found.append(Input(path=path, kind=kind, file_bytes=check_inputs([path], flag)))
    return found


def read_texts(given: Input, cutter: Cutter, json_key: str) -> Iterator[str]:
    """The texts of one input that is not token ids; plain text in blocks.

    Raises:
        ConfigError, DamagedError: see `read_pieces` and `parse_lines`.
    """
    for piece in read_pieces([given], cutter):
        if isinstance(piece, TextBlock):
            yield piece.text
        elif isinstance(piece, LineChunk):
            yield from (row[0] for row in parse_lines(piece, [json_key]))


def read_pieces(inputs: Sequence[Input], cutter: Cutter) -> Iterator[Portion]:
    """The inputs in order.

    Raises:
        ConfigError: a text that is not UTF-8, or that is too long and has no place to cut it.
        DamagedError: a packed file that is broken.
    """
    for given in inputs:
        if given.kind == "jsonl":
            yield from read_chunks([given.path])
        elif given.kind == "txt":
            yield from _read_blocks(given.path, cutter)
        else:
            assert given.facts is not None
            yield from _read_ids(given.facts)


def _read_ids(facts: CorpusFacts) -> Iterator[Ids]:
    itemsize = np.dtype(facts.dtype).itemsize
    for start in range(0, facts.tokens, IDS):
        count = min(IDS, facts.tokens - start)
        yield Ids(
            prefix=facts.prefix,
            dtype=facts.dtype,
            start=start,
            count=count,
            documents=facts.documents if start == 0 else 0,
            file_bytes=count * itemsize,
        )


def _read_blocks(path: Path, cutter: Cutter) -> Iterator[TextBlock]:
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    held, documents, reached, done = "", 1, 0, 0
    with open_unpacked(path) as (file, raw):
        more = True
        while more:
            wanted = max(TEXT_BLOCK_BYTES, len(held))  # twice as much, when it could not be cut
            data = file.read(wanted)
            more = bool(data)
            try:
                held += decode(data, final=not more)
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{path}: not UTF-8 ({error.reason}, in the {wanted} bytes from byte "
                    f"{done} on); wanted plain text"
                ) from None
            done += len(data)
            at = (len(held), len(held)) if not more else cutter.last_border(held)
            if at is None and len(held) > TEXT_BYTES_MAX:
                raise ConfigError(
                    f"{path}: over {TEXT_BYTES_MAX} characters without a place where this "
                    "tokenizer's texts can be cut; make it JSON lines, a document each"
                )
            if at is not None and at[1] > 0:
                left, right = at
                yield TextBlock(
                    text=held[:left],
                    spaces=right - left,
                    documents=documents,
                    file_bytes=raw.tell() - reached,
                )
                held, documents, reached = held[right:], 0, raw.tell()
