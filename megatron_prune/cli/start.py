"""Ranks of one command hold each other to the same start, before any process group is made of it.

Groups are built from the arguments: ranks with other ones wait for each other in other groups, one
until its time-out, another for ever. So each leaves what it was started with in the store that the
launcher names, looks at what all others left, and refuses what differs, each saying the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from typing import Any

from megatron_prune import __version__
from megatron_prune.errors import ConfigError, DistributedError
from megatron_prune.flags import FLAG, flag_name

_LAST_LOOK = timedelta(seconds=30)  # for the others to see what differs, before the store is gone


def started_with(stage: str, options: Any) -> dict[str, str]:
    """What all ranks have to be started with, by what a message calls it."""
    found = {
        "the version of megatron_prune": __version__,
        "the command": stage,
        "WORLD_SIZE": os.environ.get("WORLD_SIZE", "1"),
    }
    for one in fields(options):
        if one.repr and FLAG in one.metadata:
            switches = one.metadata[FLAG].switches
            names = map(flag_name, switches or (one.name,))
            found["/".join(names)] = str(getattr(options, one.name))
    return found


@contextmanager
def alike(started: Mapping[str, str], timeout_minutes: float) -> Iterator[None]:
    """Around a command on ranks: refuse, on all of them, when one was started otherwise.

    The store lives as long as the command: its process groups meet at the same address.

    Raises:
        ConfigError: naming the first thing that differs, and what two ranks have.
        DistributedError: a rank did not come, or there is no store.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield
        return
    from torch.distributed import TCPStore

    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {world}, {' and '.join(missing)} not set; start ranks with torchrun"
        )
    rank, timeout = int(os.environ["RANK"]), timedelta(minutes=timeout_minutes)
    is_host = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=is_host,
            timeout=timeout,
            wait_for_workers=False,  # for as many as this rank believes there are
            multi_tenant=True,  # the process groups' rendezvous serves at the same port
        )
        # a launcher's store outlives a command that failed, and one process may run several
        meeting = store.add(f"start/{rank}", 1)
        store.set(f"start/{meeting}/{rank}", json.dumps(dict(started)))
        found = _starts(store, meeting, world)
        different = _difference(found[0], found[-1], len(found) - 1)
        store.set(f"start/{meeting}/{rank}/seen", "")
        if is_host:
            world = min(int(one["WORLD_SIZE"]) for one in found)
            seen = [f"start/{meeting}/{other}/seen" for other in range(1, world)]
            with suppress(RuntimeError):
                store.wait(seen, timeout if different is None else _LAST_LOOK)
    except RuntimeError as error:  # of the store, when it is not reached or a rank does not come
        raise DistributedError(
            f"rank {rank} of {world}: not all ranks have started within {timeout_minutes:g} "
            f"minutes ({str(error).splitlines()[0][:200]}); start the same command on every rank"
        ) from error
    if different is not None:
        raise ConfigError(different)
    yield
    del store


def _starts(store: Any, meeting: int, world: int) -> list[dict[str, str]]:
    """What each rank left, up to the first that differs from rank 0."""
    found: list[dict[str, str]] = []
    for rank in range(world):
        found.append(json.loads(store.get(f"start/{meeting}/{rank}")))
        if found[rank] != found[0]:
            break
    return found


def _difference(first: Mapping[str, str], other: Mapping[str, str], rank: int) -> str | None:
    for name in {**first, **other}:
        if first.get(name) != other.get(name):
            return (
                f"{name} differs between ranks: rank 0 has {first.get(name)}, rank {rank} has "
                f"{other.get(name)}; start every rank with the same command"
            )
    return None
