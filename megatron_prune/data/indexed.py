"""Megatron's corpus on disk: ``PREFIX.bin`` (token ids end to end) and ``PREFIX.idx`` (where they
lie).

The files are byte for byte what ``megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder``
writes (a test compares the two), with four differences in how: memory does not grow with the corpus
(that builder holds every sequence's length and offset as Python objects, about 100 bytes a
sequence); hashes are taken while writing; ``PREFIX.json``, a sidecar of facts, lies beside; and
nothing is seen under the final names before all of it is on the disk. Importing megatron.core alone
takes 4 seconds.

The index, little endian: ``MMIDIDX\\0\\0``, version u64 = 1, type u8, sequences u64, documents + 1
u64; then lengths in tokens int32[sequences], offsets in bytes int64[sequences], and for each
document the number of its first sequence, int64[documents + 1].

A corpus of three files appears whole or not at all in this way: all are written and fsynced in a
directory ``.NAME.tmp.XXXXXXXX`` beside the target, the sidecar last; then the old index goes, and
bin, json, idx are renamed in that order. No index, no corpus: at no instant can a reader pair an
old file with a new one. A run that was killed between the renames is finished by the next one
(``finish_interrupted``); one killed before leaves a directory that the next run sweeps. A lock on
it keeps two writers apart; nobody can foresee its name, so that no link can wait there.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from glob import escape
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_prune.errors import ConfigError, StorageError
from megatron_prune.files import (
    FileRecord,
    HashedFile,
    flush_path,
    hash_file,
    lock,
    one_at_a_time,
    write_file,
)
from megatron_prune.model.lazy import np
from megatron_prune.parsing import parse_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
CODES = {kind: code for code, kind in TYPES.items()}
SUFFIXES = (".bin", ".json", ".idx")  # in the order they are published; the index makes it a corpus
_PIECE = 1 << 17  # sequences handled at a time when the index is put together


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The type Megatron stores ids of such a vocabulary in (``DType.optimal_dtype``)."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def corpus_path(prefix: str | Path, suffix: str) -> Path:
    """``/data/en_text_document`` and ``.idx``, joined; dots in names are kept."""
    return Path(f"{prefix}{suffix}")


def refuse_existing(prefix: str | Path, *, overwrite: bool) -> None:
    """Refuse a target that is there already.

    Raises:
        ConfigError: a file of the corpus's name exists and ``overwrite`` is not set, or it is a
            directory.
    """
    for path in (corpus_path(prefix, suffix) for suffix in SUFFIXES):
        if path.is_dir():
            raise ConfigError(f"{path} is a directory; choose another --output-prefix")
        if path.exists() and not overwrite:
            raise ConfigError(
                f"{path} exists; --overwrite replaces it once the new corpus is complete"
            )


def claim_target(prefix: str | Path, *, overwrite: bool) -> bool:
    """Finish what an interrupted run left at ``prefix``, and refuse what is there otherwise.

    Returns:
        Whether what is there may be replaced: as asked, or because the run that made it never
        reported that it was done, so that the same command just works again.
    """
    overwrite = finish_interrupted(prefix) or overwrite
    refuse_existing(prefix, overwrite=overwrite)
    return overwrite


def finish_interrupted(prefix: str | Path) -> bool:
    """Publish a corpus whose writer was killed after the last byte but before the last rename.

    Returns:
        Whether there was one; leftovers of any other kind are not touched.
    """
    if corpus_path(prefix, ".idx").exists() or not (parent := _parent(prefix)).is_dir():
        return False
    with one_at_a_time(parent):
        for folder in _temporaries(prefix):
            with _locked(folder) as is_ours:
                if is_ours is not False and _is_complete(prefix, folder):
                    _publish(prefix, folder)
                    return True
    return False


def _is_complete(prefix: str | Path, folder: Path) -> bool:
    """Whether a temporary, with what it has published already, makes a corpus."""
    index, sidecar, data = (folder / suffix[1:] for suffix in (".idx", ".json", ".bin"))
    if not index.exists() or (data.exists() and not sidecar.exists()):
        return False  # killed before the sidecar was complete
    record = sidecar if sidecar.exists() else corpus_path(prefix, ".json")
    written = data if data.exists() else corpus_path(prefix, ".bin")
    if not (record.is_file() and written.is_file()):
        return False
    try:
        facts = parse_json(record.read_bytes())
        wanted = facts["bin"]["bytes"], facts["idx"]["sha256"]
    except (ValueError, KeyError, TypeError):
        return False  # killed while the sidecar was written
    return bool(wanted == (written.stat().st_size, hash_file(index).sha256))


def _parent(prefix: str | Path) -> Path:
    return corpus_path(prefix, ".bin").absolute().parent


def _temporaries(prefix: str | Path) -> list[Path]:
    return sorted(_parent(prefix).glob(f".{escape(Path(prefix).name)}.tmp.*"))


@contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether a temporary is this process's for the block: False while its writer lives, None
    where the file system has no locks, or it is no directory."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        yield lock(handle)
    finally:
        os.close(handle)


def _claim(prefix: str | Path) -> tuple[Path, int]:
    """A new temporary directory of a corpus, and the handle that is its lock as long as this
    process lives; sweeps those of dead writers.

    Raises:
        ConfigError: another process is writing this corpus.
    """
    parent = _parent(prefix)
    with one_at_a_time(parent):
        for folder in _temporaries(prefix):
            with _locked(folder) as is_ours:
                if is_ours:
                    shutil.rmtree(folder)
            if is_ours is False:
                raise ConfigError(
                    f"{prefix}: another process is writing this corpus ({folder.name} is locked); "
                    "wait for it"
                )
        folder = parent / f".{Path(prefix).name}.tmp.{secrets.token_hex(4)}"
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        lock(handle)  # some cluster file systems have none
    return folder, handle


def _publish(prefix: str | Path, folder: Path) -> None:
    parent = _parent(prefix)
    flush_path(folder)
    corpus_path(prefix, ".idx").unlink(missing_ok=True)
    for suffix in SUFFIXES:
        if (folder / suffix[1:]).exists():
            os.replace(folder / suffix[1:], corpus_path(prefix, suffix))
    flush_path(parent)
    folder.rmdir()


@contextmanager
def _writing(prefix: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{prefix}: cannot be written: {error.strerror}") from error


class CorpusWriter:
    """One corpus being written; as a context manager it removes what it wrote unless published.

    Lengths and document ends wait in unnamed files in the target's folder, 4 and 8 bytes each.

    Attributes:
        documents, sequences, tokens: how many were added so far.
        folder: where the files lie until they are published.
        max_token_id: the largest id so far, -1 before the first.
    """

    def __init__(
        self, prefix: str | Path, dtype: np.dtype[Any], *, overwrite: bool = False
    ) -> None:
        claim_target(prefix, overwrite=overwrite)
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype)
        self.documents = self.sequences = self.tokens = 0
        self.max_token_id = -1
        self._publishing = False
        with _writing(self.prefix):
            _parent(prefix).mkdir(parents=True, exist_ok=True)
            self.folder, self._handle = _claim(prefix)
            self._lengths = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (closed at exit)
            self._ends = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
            self._data = open(self.folder / "bin", "xb")  # noqa: SIM115
            self._data_out = HashedFile(self._data)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._publishing:
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._handle)
        for file in (self._data, self._lengths, self._ends):
            with suppress(OSError):  # a full disk again; what counts was flushed by prepare
                file.close()

    def add(
        self,
        tokens: NDArray[Any],
        lengths: NDArray[np.int32],
        sequences_per_document: NDArray[np.int64],
    ) -> None:
        """Append whole documents.

        Args:
            tokens: [tokens] in the corpus's type, the ids of all sequences end to end.
            lengths: [sequences] in tokens.
            sequences_per_document: [documents].
        """
        assert tokens.dtype == self.dtype and tokens.size == int(lengths.sum(dtype=np.int64))
        assert lengths.size == int(sequences_per_document.sum())
        ends = self.sequences + np.cumsum(sequences_per_document, dtype=np.int64)
        with _writing(self.prefix):
            self._data_out.write(tokens.tobytes())
            self._lengths.write(lengths.astype("<i4").tobytes())
            self._ends.write(ends.astype("<i8").tobytes())
        self.documents += sequences_per_document.size
        self.sequences += lengths.size
        self.tokens += tokens.size
        if tokens.size:
            self.max_token_id = max(self.max_token_id, int(tokens.max()))

    def prepare(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Put all three files on the disk under their temporary names; returns the sidecar.

        ``facts`` go into the sidecar in front of what the writer knows itself.
        """
        with _writing(self.prefix):
            sidecar = dict(
                facts,
                documents=self.documents,
                sequences=self.sequences,
                tokens=self.tokens,
                max_token_id=self.max_token_id,
                dtype=self.dtype.name,
                bin=asdict(self._data_out.finish()),
                idx=asdict(self._write_index()),
            )
            write_file(self.folder / "json", (json.dumps(sidecar, indent=2) + "\n").encode())
        return sidecar

    def publish(self) -> None:
        """Rename to the final names; call after ``prepare``."""
        self._publishing = True
        with _writing(self.prefix):
            _publish(self.prefix, self.folder)

    def _write_index(self) -> FileRecord:
        with open(self.folder / "idx", "xb") as file:
            out = HashedFile(file)
            code = CODES[self.dtype.name]
            out.write(HEADER.pack(MAGIC, 1, code, self.sequences, self.documents + 1))
            for lengths in _pieces(self._lengths, 4):
                out.write(lengths)
            offset = 0
            for lengths in _pieces(self._lengths, 4):
                tokens = np.cumsum(np.frombuffer(lengths, "<i4"), dtype=np.int64)
                ends = offset + tokens * self.dtype.itemsize
                out.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes())
                offset = int(ends[-1])
            out.write(struct.pack("<q", 0))
            for document_ends in _pieces(self._ends, 8):
                out.write(document_ends)
            return out.finish()


def _pieces(file: BinaryIO, itemsize: int) -> Iterator[bytes]:
    file.flush()
    file.seek(0)
    while piece := file.read(_PIECE * itemsize):
        yield piece
