"""Text files as they lie, packed by gzip (``.gz``) or zstandard (``.zst``) or not at all.

Python reads zstandard from 3.14 on; before that the package ``backports.zstd`` does the same.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

from megatron_prune.errors import ConfigError, DamagedError

PACKED_SUFFIXES = (".gz", ".zst")


def without_packing(path: Path) -> Path:
    """``a.jsonl`` of ``a.jsonl.gz``; others as they are."""
    return path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path


@contextmanager
def open_unpacked(path: Path) -> Iterator[tuple[Any, BinaryIO]]:
    """The bytes a file holds, and the file on the disk, whose position is the progress.

    Raises:
        ConfigError: zstandard, and nothing here that reads it.
        DamagedError: a packed file that is cut short or broken; while reading, too.
    """
    broken: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    with open(path, "rb") as raw:
        file: Any = raw
        if path.suffix == ".gz":
            file = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            zstd = import_zstd(path)
            file, broken = zstd.ZstdFile(raw), (*broken, zstd.ZstdError)
        try:
            yield file, raw
        except broken as error:
            kind = {".gz": "gzip", ".zst": "zstandard"}.get(path.suffix, "text")
            raise DamagedError(
                f"{path}: not a whole {kind} file ({error}); copy it again"
            ) from None


def import_zstd(path: Path) -> Any:
    """Python's own module, or the package.

    Raises:
        ConfigError: there is neither.
    """
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ConfigError(
        f"{path}: .zst is read with the package backports.zstd, which is not here; "
        "pip install 'megatron_prune[zstd]', or pack it as .gz"
    )
