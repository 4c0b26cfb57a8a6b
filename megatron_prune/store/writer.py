"""What every target format does: name its files, write each of them alone, then tie them together.

A file's bytes depend on the target only, never on who writes it, so one process and several
torchrun ranks that take the files in turn leave the same directory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from megatron_prune.files import FileRecord
from megatron_prune.model.axes import axes_of, split_dim, split_layer, tensor_shape
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelShape
from megatron_prune.sources.source import Source

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
        stages: names of the files that hold tensors, in order; those in one list hold parts of the
            same layers.
        total_bytes: tensor bytes over all files, for progress.
    """

    stages: list[list[str]]
    total_bytes: int

    @property
    def files(self) -> list[str]:
        return [file for stage in self.stages for file in stage]

    @abstractmethod
    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Generator[None, None, Written]:
        """Write one file of ``files`` and flush it to disk, with a pause after each layer."""

    def write_files(
        self, directory: Path, files: Collection[str], pool: ThreadPoolExecutor, progress: Progress
    ) -> dict[str, Written]:
        """Write some of the files; those of one stage layer by layer in step.

        So every layer of the source is read from the disk once: a row-parallel tensor lies across
        all ranks' files, and the page cache does not hold a large model until the next file's turn.
        """
        written = {}
        for stage in self.stages:
            steps = {f: self.write(directory, f, pool, progress) for f in stage if f in files}
            while steps:
                for file, step in list(steps.items()):
                    try:
                        next(step)
                    except StopIteration as end:
                        written[file] = end.value
                        del steps[file]
        return written

    @abstractmethod
    def finish(self, directory: Path, written: Mapping[str, Written]) -> None:
        """Write what ties the files together; runs once, after all of them."""


def row_blocks(source: Source, name: str, shape: ModelShape) -> Iterator[Callable[[], Tensor]]:
    """The reads of a tensor in blocks of rows, to be written one after another.

    Yields:
        What reads ``[rows, *]`` of the tensor, in its stored dtype and of about ``BLOCK_BYTES``; a
        tensor whose split axis is not its first dim comes as one block.
    """
    axes, sizes = axes_of(name), tensor_shape(name, shape)
    if split_dim(axes) != 0:
        yield partial(source.read, name)
        return
    per_index = shape.rows(axes[0]) * prod(sizes[1:]) * source.dtype(name).itemsize
    step, stop = max(1, BLOCK_BYTES // per_index), shape.size(axes[0], split_layer(name)[0])
    for at in range(0, stop, step):
        yield partial(source.read, name, at, min(at + step, stop))


def ahead(reads: Iterable[Callable[[], Tensor]], pool: ThreadPoolExecutor) -> Iterator[memoryview]:
    """The bytes of tensors of any shape and dtype, in order, each row by row.

    The ``pool`` reads the next two while one is used, so that three are held in memory.
    """
    coming: deque[Future[memoryview]] = deque()
    for read in reads:
        coming.append(pool.submit(_read_bytes, read))
        if len(coming) > 2:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def _read_bytes(read: Callable[[], Tensor]) -> memoryview:
    """A tensor's values as they lie on disk: row by row, in their own dtype."""
    return read().contiguous().reshape(-1).view(torch.uint8).numpy().data
