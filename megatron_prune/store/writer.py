"""What every target format does: name its files, write each of them alone, then tie them together.

A file's bytes depend on the target only, never on who writes it, so one process and several
torchrun ranks that take the files in turn leave the same directory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.axes import axes_of, split_dim, tensor_shape
from megatron_prune.shape import ModelShape
from megatron_prune.source import Source
from megatron_prune.store.commit import FileRecord

BLOCK_BYTES = 32 << 20  # rows are moved in blocks of this size: what a step holds in memory

Progress = Callable[[int], object]  # told the bytes of tensor data just written


@dataclass(frozen=True)
class Written:
    """A finished file and what the format has to know of it to tie the files together."""

    record: FileRecord
    payload: Any = None


class Writer(ABC):
    """Writes one source in one format.

    Attributes:
        files: names of the files that hold tensors, in order.
        total_bytes: tensor bytes over all files, for progress.
    """

    files: list[str]
    total_bytes: int

    @abstractmethod
    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Written:
        """Write one file of ``files`` and flush it to disk."""

    @abstractmethod
    def finish(self, directory: Path, written: Mapping[str, Written]) -> None:
        """Write what ties the files together; runs once, after all of them."""


def row_blocks(
    source: Source, name: str, shape: ModelShape, start: int = 0, stop: int | None = None
) -> Iterator[Tensor]:
    """A tensor as blocks of rows of about BLOCK_BYTES, to be written one after another.

    A tensor whose split axis is not its first dim comes as one block.
    """
    axes, sizes = axes_of(name), tensor_shape(name, shape)
    stop = shape.size(axes[split_dim(axes) or 0]) if stop is None else stop
    if split_dim(axes) != 0:
        yield source.read(name, start, stop) if split_dim(axes) else source.read(name)
        return
    per_index = shape.rows(axes[0]) * prod(sizes[1:]) * source.dtype(name).itemsize
    step = max(1, BLOCK_BYTES // per_index)
    for at in range(start, stop, step):
        yield source.read(name, at, min(at + step, stop))


def value_bytes(x: Tensor) -> memoryview:
    """A tensor's values as they lie on disk: row by row, in their own dtype."""
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().data
