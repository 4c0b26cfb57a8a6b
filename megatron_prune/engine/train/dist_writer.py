"""Writing a sharded state with megatron.core.dist_checkpointing, from within this process.

Megatron's own writer forks one process a file and starts a manager process to collect their
results; these outlive a killed parent, re-import the main module and cost seconds a save. Here
every rank writes its files itself, in a thread when training goes on meanwhile, hashes them while
writing, and all ranks learn of a failure before anything is tied together.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import SerializationFormat

from megatron_prune.engine.failures import together
from megatron_prune.engine.groups import Groups
from megatron_prune.files import FileRecord, HashedFile

_FILES_PER_RANK = 1


class _InProcessWriter(filesystem_async.FileSystemWriterAsync):
    """`FileSystemWriterAsync` without its processes; the records of its files by name.

    One save at a time: the records are the class's.
    """

    records: dict[str, FileRecord]

    @staticmethod
    def write_preloaded_data_multiproc(
        transforms: list[Any],
        use_msc: bool,
        rank: int,
        write_buckets: Sequence[Any],
        results: queue.Queue[Any],
    ) -> None:
        """Write this rank's files; raises what went wrong."""
        write_item: Any = filesystem._write_item
        found: dict[int, list[Any]] = {}
        with ThreadPoolExecutor(1) as pool:
            for index, (path, name, (bytes_data, tensor_data)) in enumerate(write_buckets):
                stream = HashedFile.create(Path(path), pool)
                try:
                    found[index] = [
                        write_item(
                            *transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE
                        )
                        for item, data in (*bytes_data, *tensor_data)
                    ]
                except RuntimeError:
                    if stream.failure is not None:
                        raise stream.failure from None
                    raise
                _InProcessWriter.records[name] = stream.close()
        results.put(found)


@contextmanager
def _without_processes(records: dict[str, FileRecord]) -> Iterator[None]:
    """Megatron's strategy finds its writer and queue by their names, which mean ours meanwhile."""
    _InProcessWriter.records = records
    ours: tuple[tuple[Any, str, Any], ...] = (
        (torch_strategy, "FileSystemWriterAsync", _InProcessWriter),
        (filesystem_async, "_get_write_results_queue", queue.Queue),
    )
    theirs = [getattr(module, name) for module, name, _ in ours]
    for module, name, mine in ours:
        setattr(module, name, mine)
    try:
        yield
    finally:
        for (module, name, _), found in zip(ours, theirs):
            setattr(module, name, found)


class ShardedWrite:
    """A sharded state dict on its way into an empty directory; all ranks begin and finish it."""

    def __init__(
        self, state: dict[str, Any], directory: Path, groups: Groups, *, overlaps: bool
    ) -> None:
        """Plan with all ranks.

        Args:
            overlaps: copy the state to the host and write the copy in a thread, so that training
                may change the state at once; else `finish` writes.
        """
        self._groups = groups
        self._records: dict[str, FileRecord] = {}
        self._thread: ThreadPoolExecutor | None = None
        strategy: Any = torch_strategy.TorchDistSaveShardedStrategy(
            "torch_dist", 1, thread_count=_FILES_PER_RANK
        )
        if groups.copies_group.size() > 1:
            strategy = FullyParallelSaveStrategyWrapper(strategy, groups.copies_group)
        with _without_processes(self._records):
            self._request = dist_checkpointing.save(
                state, str(directory), strategy, async_sharded_save=True
            )
        self._writing: Future[None] | None = None
        if overlaps:
            args = together(groups.ranks, lambda: _copied(self._request))
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="save")
            self._writing = self._thread.submit(_write, self._request, args)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's files are still being written behind training."""
        return self._writing is not None and not self._writing.done()

    def finish(self) -> dict[str, FileRecord]:
        """Wait for the files of all ranks and tie them together.

        Returns:
            The files of all ranks with their hashes, on every rank; the small ones rank 0 adds
            (``common.pt``, ``.metadata``, ``metadata.json``) are not among them.

        Raises:
            OSError: this rank could not write.
            DistributedError: another one could not.
        """
        writing = self._writing
        if writing is not None:
            together(self._groups.ranks, writing.result)
        else:
            together(self._groups.ranks, lambda: _write(self._request, _preloaded(self._request)))
        for finalize in self._request.finalize_fns:
            finalize()
        everyone = self._groups.ranks.gather(self._records)
        return {name: record for one in everyone for name, record in one.items()}

    def close(self) -> None:
        """Nothing of this is written any more after it."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)


def _preloaded(request: Any) -> list[Any]:
    """The arguments of the writing function, tensors on the host."""
    args = list(request.async_fn_args or ())
    if request.preload_fn is not None:
        args[1] = request.preload_fn()
    return args


def _copied(request: Any) -> list[Any]:
    """`_preloaded`, with nothing that shares memory with the running model."""
    args = _preloaded(request)
    if request.preload_fn is None:
        return args
    live = {t.data_ptr() for _, _, (_, tensors) in request.async_fn_args[1] for _, t in tensors}
    args[1] = [
        (path, name, (data, [(i, t.clone() if t.data_ptr() in live else t) for i, t in tensors]))
        for path, name, (data, tensors) in args[1]
    ]
    return args


def _write(request: Any, args: list[Any]) -> None:
    if request.async_fn is None:  # a rank with nothing to write
        return
    crc = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # half the time; the manifest has SHA-256
    try:
        request.async_fn(*args, **request.async_fn_kwargs)
    finally:
        torch.serialization.set_crc32_options(crc)
