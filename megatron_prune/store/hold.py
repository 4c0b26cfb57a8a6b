"""A checkpoint that is being read is not removed by the run that wrote it.

A reader holds a shared lock (flock) on the checkpoint's directory for as long as it has it open;
``train --keep-last`` asks for an exclusive one before it removes a checkpoint, and leaves it to the
next save when it gets none. The kernel drops the lock of a reader that dies. On a file system
without locks readers are not protected, and not refused either.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path


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
    """Keep ``directory`` from being removed; None when it is gone, or about to go."""
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    held = Hold(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError:  # no locks here
        return held
    try:
        is_there = os.path.samestat(os.stat(directory), os.fstat(handle))
    except FileNotFoundError:  # renamed between the two
        return None
    return held if is_there else None
