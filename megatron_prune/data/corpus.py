"""From JSON lines to token ids, in order, in bounded memory, with any number of processes.

Every line is one JSON object, and the value of each key asked for is a string; blank lines are
skipped; ``.gz`` and ``.zst`` are read as they are. A line is refused, with its file and number,
when it is not UTF-8, not JSON, not an object, lacks the key, holds no string there, or half a
surrogate pair. The first bad line in the order of the files is the one named, however many workers
run.

A document becomes what Megatron-LM's ``preprocess_data.py`` makes of it: the tokenizer's own
default special tokens on every sequence, EOD on the last one if asked for, sequences without a
token left out. A text of no tokens is a document of no sequences.

The price: memory is that of the chunks under way, ``2 * workers + 2`` of half a megabyte (or one
line, if it is longer), and never depends on the size of the corpus. Workers are spawned, not
forked: the tokenizers hold threads. Each starts in 0.2 to 0.5 s (2.5 s for the few tokenizers that
need transformers) and ends by itself when the parent is killed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from megatron_prune.data.packed import import_zstd, open_unpacked
from megatron_prune.data.sentences import SentenceSplitter
from megatron_prune.data.tokenizers import TextTokenizer
from megatron_prune.errors import ConfigError, DistributedError
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK_BYTES = 1 << 19
LINE_BYTES_MAX = 1 << 26  # tokenizers take 30 bytes for each; a binary file has no line ends
_PACKED = {".bz2", ".xz", ".zip", ".lz4", ".parquet", ".arrow", ".tar", ".7z"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class LineChunk:
    """Some whole lines of a file.

    ``file_bytes`` is how far the file as it lies on the disk (packed, if it is) has been read for
    this chunk, counted from the chunk before.
    """

    path: str
    first_line: int
    lines: list[bytes]
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Ids end to end, the length of each sequence, the number of sequences of each document."""

    tokens: NDArray[Any]
    lengths: NDArray[np.int32]
    sequences_per_document: NDArray[np.int64]


def check_inputs(paths: Sequence[str | Path], flag: str = "--input") -> int:
    """Refuse inputs that cannot be read; returns their size on the disk in bytes.

    Args:
        flag: that named them, for messages; empty where several could have.

    Raises:
        ConfigError: missing, a directory, unreadable, or packed in a way we do not unpack.
    """
    total = 0
    for path in map(Path, paths):
        where = f"{flag} {path}".strip()
        if path.suffix in _PACKED:
            raise ConfigError(
                f"{where}: {path.suffix} is not read; unpack it to .jsonl, or pack it as .jsonl.gz"
            )
        if path.suffix == ".zst":
            import_zstd(path)
        if path.is_dir():
            raise ConfigError(
                f"{where} is a directory; wanted .jsonl files (the shell expands {path}/*.jsonl)"
            )
        try:
            with open(path, "rb") as file:
                total += os.fstat(file.fileno()).st_size
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}") from None
    return total


def read_chunks(paths: Iterable[str | Path]) -> Iterator[LineChunk]:
    """The files' lines in order, in chunks of about ``CHUNK_BYTES``."""
    for path in map(Path, paths):
        with open_unpacked(path) as (file, raw):
            yield from _chunks_of(path, file, raw)


def _chunks_of(path: Path, file: Any, raw: BinaryIO) -> Iterator[LineChunk]:
    number, reached = 1, 0
    lines: list[bytes] = []
    size = 0
    while line := file.readline(LINE_BYTES_MAX):
        if len(line) == LINE_BYTES_MAX:
            raise ConfigError(
                f"{path}, line {number + len(lines)}: over {LINE_BYTES_MAX} bytes; wanted one JSON "
                "object a line"
            )
        lines.append(line)
        size += len(line)
        if size >= CHUNK_BYTES:
            yield LineChunk(
                path=str(path), first_line=number, lines=lines, file_bytes=raw.tell() - reached
            )
            number, reached = number + len(lines), raw.tell()
            lines, size = [], 0
    if lines:
        yield LineChunk(
            path=str(path), first_line=number, lines=lines, file_bytes=raw.tell() - reached
        )


def parse_lines(
    chunk: LineChunk, keys: Sequence[str], advice: str = "name one with --json-key"
) -> Iterator[list[str]]:
    """The values of ``keys`` in each line that is not blank.

    Args:
        advice: what to do about a key that is not there.

    Raises:
        ConfigError: a line is not what the module says, with the file and the line.
    """
    for number, line in enumerate(chunk.lines, chunk.first_line):
        if line.isspace():
            continue
        where = f"{chunk.path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f'{where}: not JSON ({error}); wanted one object a line, like {{"{keys[0]}": ...}}'
            ) from None
        if not isinstance(record, dict):
            raise ConfigError(
                f"{where}: a JSON {type(record).__name__}, wanted an object with the key "
                f"{keys[0]!r}"
            )
        yield [_text_of(record, key, where, advice) for key in keys]


def _text_of(record: dict[str, Any], key: str, where: str, advice: str) -> str:
    if key not in record:
        there = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ConfigError(f"{where}: no key {key!r}, the keys there: {there}; {advice}")
    text = record[key]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {key!r} is {json.dumps(text)[:40]}, wanted a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: {key!r} holds half a surrogate pair at character {error.start}"
        ) from None
    return text


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """What a worker does to a chunk; everything it needs travels with it."""

    tokenizer: TextTokenizer
    keys: tuple[str, ...]
    dtype: np.dtype[Any]
    eod: int | None = None
    splitter: SentenceSplitter | None = None

    def __call__(self, chunk: LineChunk) -> list[Documents]:
        """The documents of a chunk, one entry a key."""
        rows = list(parse_lines(chunk, self.keys))
        return [self._encode([row[i] for row in rows], chunk) for i in range(len(self.keys))]

    def _encode(self, texts: list[str], chunk: LineChunk) -> Documents:
        split = self.splitter.split if self.splitter else lambda text: [text]
        parts = [split(text) for text in texts]
        ids = iter(self.tokenizer.encode_batch([s for part in parts for s in part], True))
        kept: list[list[int]] = []
        counts = []
        for part in parts:
            sequences = [sequence for sequence in (next(ids) for _ in part) if sequence]
            if sequences and self.eod is not None:
                sequences[-1].append(self.eod)
            kept.extend(sequences)
            counts.append(len(sequences))
        lengths = np.fromiter(map(len, kept), dtype=np.int32, count=len(kept))
        wide = np.fromiter(chain.from_iterable(kept), dtype=np.int64, count=int(lengths.sum()))
        if wide.size and int(wide.max()) > np.iinfo(self.dtype).max:
            raise ConfigError(
                f"{chunk.path}, from line {chunk.first_line}: token id {wide.max()} does not fit "
                f"{self.dtype}, the type "
                f"for the {self.tokenizer.vocab_size} tokens of {self.tokenizer.name}"
            )
        return Documents(
            tokens=wide.astype(self.dtype),
            lengths=lengths,
            sequences_per_document=np.array(counts, dtype=np.int64),
        )


def map_pieces(
    pieces: Iterable[Item], work: Callable[[Item], Result], workers: int = 1
) -> Iterator[tuple[Item, Result]]:
    """Each piece of a corpus with what ``work`` makes of it, in order, in bounded memory.

    Args:
        work: such as an `Encoder`; sent to every worker once. One worker means this process.

    Raises:
        PruneError: what ``work`` raised on the first piece that it refused.
        DistributedError: a worker process died.
    """
    if workers == 1:
        for piece in pieces:
            yield piece, work(piece)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start_worker, initargs=(work,)
    )
    under_way: deque[tuple[Item, Future[Result]]] = deque()
    try:
        for piece in pieces:
            under_way.append((piece, pool.submit(_work_here, piece)))
            if len(under_way) > 2 * workers + 1:
                yield _first_done(under_way)
        while under_way:
            yield _first_done(under_way)
    except BrokenProcessPool:
        raise DistributedError(
            f"one of the {workers} workers ended without a word (killed, or out of memory?); run "
            "again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _first_done(under_way: deque[tuple[Item, Future[Result]]]) -> tuple[Item, Result]:
    piece, future = under_way.popleft()
    return piece, future.result()


_work: Callable[[Any], Any] | None = None  # of this worker process; never set in the parent


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent is killed.

    A worker waits for work on a pipe it holds both ends of, and would not notice.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work_here(piece: Any) -> Any:
    assert _work is not None
    return _work(piece)
