"""The processes that share one command: torchrun's, or this one alone.

File-to-file commands need no more of a process group than this: who am I, wait for the others,
collect small Python objects, agree on the arguments. Megatron's groups belong to ``engine``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megatron_prune.errors import DistributedError, PruneError, exit_code


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process's place among those torchrun started (``rank`` of ``world_size``)."""

    rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in rank order, on every rank. Small objects only.

        Raises:
            DistributedError: a rank ended, or did not answer in time.
        """
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world_size
        with self._told_of_lost_ranks():
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Any) -> Any:
        """``value`` of the first rank, on every rank.

        Raises:
            DistributedError: a rank ended, or did not answer in time.
        """
        if self.world_size == 1:
            return value
        import torch.distributed as dist

        values = [value if self.is_first else None]
        with self._told_of_lost_ranks():
            dist.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def _told_of_lost_ranks(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # gloo's, when a connection closes or times out
            reason = str(error).splitlines()[0]
            raise DistributedError(
                f"rank {self.rank}: another rank ended or does not answer ({reason}); see what it "
                "said"
            ) from error

    def barrier(self) -> None:
        self.gather(None)

    def agree(self, what: str, value: str) -> None:
        """Refuse, on all ranks, when ranks were started with different arguments."""
        digests = self.gather(hashlib.sha256(value.encode()).hexdigest())
        other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if other:
            raise PruneError(
                f"{what} differs between ranks: rank {other[0]} of {self.world_size} does not have "
                "what rank 0 has; start every rank with the same command and the same files"
            )

    def agree_on(self, what: str, make: Callable[[], str]) -> None:
        """`agree` on what each rank makes of its files; an error on one of them raises on all."""
        if self.world_size == 1:
            return
        value, error = "", None
        try:
            value = make()
        except Exception as caught:
            error = caught
        self.fail_together(error)
        self.agree(what, value)

    def fail_together(self, error: Exception | None) -> None:
        """Raise ``error`` here, or the first error another rank met, on every rank.

        A rank that met none ends with the exit code of that error.
        """
        met = self.gather(error and (type(error).__name__, str(error), exit_code(error)))
        if error is not None:
            raise error
        for rank, found in enumerate(met):
            if found is not None:
                name, message, code = found
                raise DistributedError(f"rank {rank} failed: {name}: {message}", code)


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The ranks of this command; joins torchrun's rendezvous over gloo when there is one."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks(rank=0, world_size=1)
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield Ranks(rank=dist.get_rank(), world_size=world_size)
    finally:
        dist.destroy_process_group()


_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_launcher() -> None:
    """Have Linux send this process SIGTERM when the torchrun that started it ends in any way: a
    launcher that is killed cannot stop its ranks, which would go on, or wait, by themselves."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() == 1:  # it has ended before
        os.kill(os.getpid(), signal.SIGTERM)


def is_first_rank() -> bool:
    """Whether this process is the one that talks to the user (before any group exists)."""
    return os.environ.get("RANK", "0") == "0"
