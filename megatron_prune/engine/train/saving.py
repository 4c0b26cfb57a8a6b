"""Saving while training goes on.

A save has two halves. In the first all ranks plan and copy their part of the state to the host; a
thread writes the copy. In the second, after the step by which all ranks have written, the files are
tied together, renamed and pointed to. Training stands still in the halves only, at the price of one
more copy of the state in host memory. Without ``--async-save`` the halves follow each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from megatron_prune.engine.groups import Groups
from megatron_prune.engine.train.checkpoint import iteration_path, saving
from megatron_prune.engine.train.dist_writer import ShardedWrite
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.store.passenger import Passenger


class Saver:
    """The save under way, if there is one; never two of them."""

    def __init__(
        self,
        options: TrainOptions,
        groups: Groups,
        passenger: Passenger,
        *,
        say: Callable[[str], None],
    ) -> None:
        self._options, self._groups, self._passenger, self._say = options, groups, passenger, say
        self._halves: Iterator[ShardedWrite] | None = None
        self._write: ShardedWrite | None = None
        self.iteration: int | None = None  # of the save under way
        self._began = self._stalled_seconds = 0.0

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing behind training."""
        return self._write is not None and self._write.is_writing

    def begin(self, state: Mapping[str, Any], **parts: Any) -> None:
        """The first half; ``parts`` are model, optimizer and scheduler.

        Raises:
            StorageError, DistributedError: see `saving`.
        """
        assert self._halves is None
        self._began = time.monotonic()
        halves = saving(
            self._options,
            self._groups,
            self._passenger,
            **parts,
            state=state,
            overlaps=self._options.async_save,
        )
        self._write = next(halves)
        self._halves, self.iteration = halves, state["iteration"]
        self._stalled_seconds = time.monotonic() - self._began

    def finish(self) -> int | None:
        """The second half, waiting for the files; the iteration saved, None without a save.

        Raises:
            StorageError, DistributedError: see `saving`.
        """
        if self._halves is None:
            return None
        since = time.monotonic()
        halves, iteration = self._halves, self.iteration
        assert iteration is not None
        self._halves = self._write = self.iteration = None
        for _ in halves:  # to its end
            raise AssertionError("a save has two halves")
        whole = time.monotonic() - self._began
        stalled = self._stalled_seconds + time.monotonic() - since
        path = iteration_path(self._options.save, iteration)
        behind = f", training stood still for {stalled:.2f} s" if self._options.async_save else ""
        self._say(f"saved {path} in {whole:.1f} s{behind}")
        return iteration

    def abandon(self) -> None:
        """Drop a save that can no longer be finished: its ranks are not together any more."""
        if self._halves is not None:
            self._write = self.iteration = None
            halves, self._halves = self._halves, None
            halves.close()  # type: ignore[attr-defined]
