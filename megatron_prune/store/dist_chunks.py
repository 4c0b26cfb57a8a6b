"""The ``.distcp`` files of a torch_dist directory: mapped, every chunk in them a view.

A chunk is what the index says it is, or it is refused. Nothing is unpickled, see `chunk`.
"""

from __future__ import annotations

import mmap
from functools import cache
from pathlib import Path

from megatron_prune.errors import DamagedError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.parsing import checked_as
from megatron_prune.store.chunk import read_header
from megatron_prune.store.dist_index import Chunk, Index


class ChunkFiles:
    """The files beside an index, none of which is shorter than the index says."""

    def __init__(self, directory: Path, index: Index) -> None:
        """Look at the files' sizes; a file is mapped when it is first read.

        Raises:
            DamagedError: one is missing or too short.
        """
        self._directory = directory
        self._map, self._locate = cache(self._open), cache(self._find)
        for file, end in index.ends.items():
            path = directory / file
            if not path.is_file():
                raise DamagedError(f"{path}: is missing; copy it again")
            if path.stat().st_size < end:
                raise DamagedError(
                    f"{path}: {path.stat().st_size} bytes, the index wants {end}; copy it again"
                )

    def _open(self, file: str) -> mmap.mmap:
        path = self._directory / file
        try:
            with open(path, "rb") as handle:
                return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; copy it again") from None

    def _find(self, chunk: Chunk) -> int:
        """Byte position of a chunk's values in its file."""
        path, data = self._directory / chunk.file, self._map(chunk.file)
        stop = chunk.start + chunk.length
        if chunk.start < 0 or stop > len(data):
            raise DamagedError(f"{path}: {len(data)} bytes, the index wants {stop}; copy it again")
        with checked_as(DamagedError, path, "a chunk cannot be read", "; copy it again"):
            header = read_header(data, chunk.start, stop)
        found = header.dtype, header.sizes, header.stride
        contiguous = tuple(torch.empty(chunk.sizes, device="meta").stride())
        if found != (chunk.dtype, chunk.sizes, contiguous) or header.stop > stop:
            raise DamagedError(
                f"{path}: holds {header.dtype} {header.sizes} strided {header.stride} where the "
                f"index says {chunk.dtype} {chunk.sizes}; copy it again"
            )
        return header.start

    def view(self, chunk: Chunk) -> Tensor:
        """The values of a chunk, of its sizes and dtype; never write to them.

        Raises:
            DamagedError: the file holds something else there.
        """
        count, position = torch.Size(chunk.sizes).numel(), self._locate(chunk)
        data = self._map(chunk.file)
        return torch.frombuffer(data, dtype=chunk.dtype, count=count, offset=position).view(
            chunk.sizes
        )

    def close(self) -> None:
        """Let go of the maps."""
        self._locate.cache_clear()
        self._map.cache_clear()
