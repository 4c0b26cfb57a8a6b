"""One run a directory: a second one on the same ``--save`` is refused, and told who is there.

The lock is the system's (flock) on ``SAVE/.lock``: a killed run holds nothing, whatever file it
left.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_prune.engine.failures import together
from megatron_prune.errors import ConfigError, StorageError
from megatron_prune.files import lies_at, lock
from megatron_prune.ranks import Ranks

LOCK = ".lock"


def _take(save: Path) -> int:
    path = save / LOCK
    while True:
        try:
            save.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}") from error
        is_locked = lock(handle)
        if is_locked is False:
            holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ConfigError(
                f"--save {save}: {holder} is training there; wait for it, or train into another "
                "directory"
            )
        if is_locked is None:
            raise StorageError(f"{path}: cannot be locked; choose a file system that can (flock)")
        if lies_at(path, handle):
            break
        os.close(handle)  # its last holder has removed it meanwhile
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


@contextmanager
def only_writer(save: Path, ranks: Ranks) -> Iterator[None]:
    """Hold ``save`` for all ranks.

    Raises:
        ConfigError: another run is there.
        StorageError: it cannot be written.
        DistributedError: on the other ranks.
    """
    handle = together(ranks, lambda: _take(save) if ranks.is_first else None)
    try:
        yield
    finally:
        if handle is not None:
            (save / LOCK).unlink(missing_ok=True)
            os.close(handle)
