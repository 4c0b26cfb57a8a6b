"""One rank's failure, told by name, and the end of all.

A rank that meets an error leaves; the others notice at their next exchange with it (gloo at once,
a silent rank after ``--distributed-timeout-minutes``) and end with exit code 5. Each says which
rank it is, so the first cause can be told from what followed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megatron_prune.errors import DistributedError
from megatron_prune.ranks import Ranks

T = TypeVar("T")

_PEER_WORDS = ("peer", "Timed out", "timed out", "timeout", "NCCL", "Connection", "Broken pipe")


def is_lost_rank(error: BaseException) -> bool:
    """Whether what torch raised tells of another rank, and not of this one."""
    return any(word in str(error) for word in _PEER_WORDS)


@contextmanager
def named_failures() -> Iterator[None]:
    """Turn what torch raises when a peer is gone into a `DistributedError` with this rank's name.

    Our own errors and, in a process alone, everything else pass through.
    """
    rank, world = os.environ.get("RANK", "0"), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if world == 1:
            raise
        if is_lost_rank(error):
            raise DistributedError(
                f"rank {rank} of {world} lost another rank ({first[:200]}); look for the rank that "
                "failed first, and start the same command again"
            ) from error
        raise DistributedError(
            f"rank {rank} of {world}: {type(error).__name__}: {first}"
        ) from error


def together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank; an error on one of them raises on all.

    ``work`` must not talk to other ranks.
    """
    error: Exception | None = None
    found: list[T] = []
    try:
        found.append(work())
    except Exception as caught:
        error = caught
    ranks.fail_together(error)
    return found[0]


def on_first_rank(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` on the first rank, for all: its result, or its error, on every rank."""
    found = together(ranks, lambda: work() if ranks.is_first else None)
    result: T = ranks.broadcast(found)
    return result
