"""What touches a disk safely: files that are hashed, flushed, replaced and locked.

A small file is replaced at once or not at all. What is hashed is hashed while it is written, so
that nothing is read again. Every lock is the system's (flock): the kernel drops it when its process
ends, so a killed writer or reader holds nothing. How whole directories appear at once is
`store.commit`'s matter, how the three files of a corpus do `data.indexed`'s.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import stat
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from megatron_prune.errors import StorageError

_FLUSH_BYTES = 256 << 20  # of one file; what is smaller stays in the page cache
_PIECE_BYTES = 1 << 18  # a call of write; its source stays in the core's cache: 15% less time
_TRIES, _TRY_SECONDS = 250, 0.02
_WORTH_A_THREAD = 1 << 16  # bytes; hashing fewer takes less time than handing them over


@dataclass(frozen=True)
class FileRecord:
    """A finished file: its size and its SHA-256."""

    bytes: int
    sha256: str


class HashedFile:
    """A file that hashes what it is given while it is being written.

    Args:
        file: open for writing at its end, nothing written yet.
        pool: hashes and flushes on its threads while more is written; None hashes in between.

    Attributes:
        position: bytes written.
        failure: the error of a write that failed; ``torch.save`` raises another in its place.
    """

    failure: OSError | None = None

    def __init__(self, file: BinaryIO, pool: ThreadPoolExecutor | None = None) -> None:
        self._file, self._pool = file, pool
        self._hash, self.position = hashlib.sha256(), 0
        self._flushed, self._flushing = 0, Future[None]()
        self._flushing.set_result(None)

    @classmethod
    def create(cls, path: Path, pool: ThreadPoolExecutor) -> HashedFile:
        """A new file of large pieces, unbuffered; `close` closes it."""
        return cls(open(path, "xb", buffering=0), pool)

    def write(self, data: bytes | memoryview) -> int:
        """Append ``data``; returns when it is both written and hashed."""
        data = memoryview(data).cast("B")
        self.position += len(data)
        hashed = None
        if self._pool is not None and len(data) > _WORTH_A_THREAD:
            hashed = self._pool.submit(self._hash.update, data)
        left = data
        try:
            while left:
                left = left[self._file.write(left[:_PIECE_BYTES]) :]
        except OSError as error:
            self.failure = error
            raise
        if hashed is None:
            self._hash.update(data)
        else:
            hashed.result()
        if self._pool is not None and self.position - self._flushed >= _FLUSH_BYTES:
            self._flush_behind(self._pool)
        return len(data)

    def _flush_behind(self, pool: ThreadPoolExecutor) -> None:
        """Have the disk take what was written and the page cache forget it, while more is written:
        a model larger than memory would push its own source out, page by page."""
        self._flushing.result()
        self._flushed = self.position
        self._flushing = pool.submit(_flush, self._file.fileno(), self.position)

    def tell(self) -> int:
        """Bytes written, as the writer of torch's distributed checkpoints asks."""
        return self.position

    def flush(self) -> None:
        """Nothing to do: `finish` flushes."""

    def finish(self) -> FileRecord:
        """Flush to disk; the file stays open, and locked where it is."""
        self._flushing.result()
        flush_file(self._file)
        return FileRecord(self.position, self._hash.hexdigest())

    def close(self) -> FileRecord:
        """Flush to disk and close."""
        record = self.finish()
        self._file.close()
        return record


def _flush(handle: int, stop: int) -> None:
    os.fdatasync(handle)
    os.posix_fadvise(handle, 0, stop, os.POSIX_FADV_DONTNEED)


def hash_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file that lies on disk; reads it once."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def flush_file(file: Any) -> None:
    """Have the disk take what was written to an open file, text or binary."""
    file.flush()
    os.fsync(file.fileno())


def flush_path(path: Path) -> None:
    """Have the disk take a file that was written, or the names in a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Write a small new file and flush it to disk."""
    with open(path, "xb") as file:
        file.write(data)
        flush_file(file)


def replace_file(path: Path, data: bytes) -> None:
    """Put a small file in place of another, at once; sweeps what dead writers left beside it.

    Raises:
        StorageError: it cannot be written; what was there before is still there.
    """
    _sweep_files_beside(path)
    temporary = path.with_name(f".{path.name}.tmp.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            lock(file.fileno())  # where no file can be locked, none is swept
            file.write(data)
            flush_file(file)
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # of a file system that takes nothing
            temporary.unlink()
        raise StorageError(f"{path}: {error.strerror}; nothing was changed") from error
    flush_path(path.parent)


def open_to_append(path: Path) -> TextIO:
    """A file of lines, old or new, to add to.

    Raises:
        StorageError: it cannot be written, is a link (which may lead to a file that is not ours to
            write), or no file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        reason = "is a link, and not followed" if path.is_symlink() else error.strerror
        raise StorageError(f"{path}: {reason}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise StorageError(f"{path}: is no file; move it away")
    return open(handle, "a", encoding="utf-8")


def _sweep_files_beside(path: Path) -> None:
    for temporary in path.parent.glob(f".{escape(path.name)}.tmp.*"):
        with suppress(OSError):  # another's, or gone meanwhile
            if temporary.is_file() and (handle := try_lock(temporary)) is not None:
                temporary.unlink()
                os.close(handle)


def lock(handle: int, *, shared: bool = False) -> bool | None:
    """Lock an open file or directory for as long as its handle is open, without waiting.

    Returns:
        Whether this process has it now; None where the file system has no locks.
    """
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def lies_at(path: Path, handle: int) -> bool:
    """Whether what is open as ``handle`` is still there: another may have renamed or removed it
    between the opening and the lock."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def try_lock(path: Path) -> int | None:
    """An open, locked handle of a file or directory, or None while another process holds it.

    The handle is the lock: whoever closes it lets go.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    if lock(handle):
        return handle
    os.close(handle)
    return None


class Hold:
    """An open directory with a shared lock, until `release` or until nothing refers to it."""

    def __init__(self, handle: int) -> None:
        self._handle: int | None = handle

    def release(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)

    def __del__(self) -> None:
        self.release()


def hold(directory: Path) -> Hold | None:
    """Keep a checkpoint's directory from being removed while it is read.

    ``train --keep-last`` asks for an exclusive lock before it removes a checkpoint, and leaves it
    to the next save when it gets none. On a file system without locks readers are not protected,
    and not refused either.

    Returns:
        None when it is gone, or about to go.
    """
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    held, is_locked = Hold(handle), lock(handle, shared=True)
    return held if is_locked is None or (is_locked and lies_at(directory, handle)) else None


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Between processes, for a moment; after a while without, for a lock may be anybody's."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        for _ in range(_TRIES):
            if lock(handle):
                break
            time.sleep(_TRY_SECONDS)
        yield
    finally:
        os.close(handle)
