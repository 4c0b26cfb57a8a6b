"""The errors a user can cause or meet. Each carries the exit code of the command line.

A message says where, what was found, what was wanted and what to do, with the values.
"""

from __future__ import annotations

import errno

_STORAGE = {errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT}


class PruneError(Exception):
    """Base of every error this package raises on purpose."""

    exit_code = 2


class ConfigError(PruneError):
    """An option, a recipe or a model configuration that cannot be used."""


class ShapeError(PruneError):
    """Sizes that do not fit: an axis, a parallel layout, a tensor."""


class PlanError(PruneError):
    """A plan that is malformed, impossible, or made for another model."""


class CheckpointError(PruneError):
    """A checkpoint that is missing, incomplete or of a kind we do not read."""


class DamagedError(CheckpointError):
    """A checkpoint whose bytes are not what they should be."""

    exit_code = 3


class StorageError(PruneError):
    """The output cannot be written: full, read-only, no permission."""

    exit_code = 4


class DistributedError(PruneError):
    """A rank failed, disagreed or did not answer.

    ``exit_code`` is that of the error another rank has told of, if it did: all ranks end alike.
    """

    exit_code = 5

    def __init__(self, message: str, exit_code: int = 5) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(PruneError):
    """Stopped by a signal after saving; the same command continues."""

    exit_code = 75


def exit_code(error: Exception) -> int:
    """What a command ends with that met ``error``; 5 for what is no error of ours or the disk's."""
    if isinstance(error, PruneError):
        return error.exit_code
    if isinstance(error, OSError):
        return StorageError.exit_code if error.errno in _STORAGE else ConfigError.exit_code
    return DistributedError.exit_code
