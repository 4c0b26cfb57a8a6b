"""Ranks of one command hold each other to the same start, before any process group is made of it.

Groups are built from the arguments: ranks with other ones wait for each other in other groups, one
until its time-out, another for ever. So each leaves what it was started with in the store that the
launcher names, looks at what all others left, and refuses what differs, each saying the same.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from typing import Any

from megatron_prune import __version__
from megatron_prune.errors import ConfigError, DistributedError, PruneError
from megatron_prune.flags import FLAG, flag_name

_LAST_LOOK = timedelta(seconds=30)  # for the others to see what differs, before the store is gone
_REFUSED = {"the command line": "refused"}  # what a rank leaves that does not understand its own


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


def check_launcher() -> None:
    """Refuse what a launcher cannot have set.

    Raises:
        DistributedError: no number, or a rank that is not among so many.
    """
    told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")}
    for name, value in told.items():
        if value is not None and not re.fullmatch("[0-9]{1,9}", value):
            raise DistributedError(f"{name} is {value!r}; wanted a number, as torchrun sets it")
    world, rank = int(told["WORLD_SIZE"] or 1), int(told["RANK"] or 0)
    if told["WORLD_SIZE"] is not None and not rank < world:
        raise DistributedError(f"RANK is {rank} of WORLD_SIZE {world}; start ranks with torchrun")


@contextmanager
def refusal_told(on_ranks: bool) -> Iterator[None]:
    """Around the reading of a command line that ranks may share: where this rank refuses its own,
    the others end too. They would wait for it until their time-out."""
    try:
        yield
    except (SystemExit, PruneError) as refusal:
        is_help = isinstance(refusal, SystemExit) and refusal.code == 0
        if on_ranks and not is_help:
            with suppress(PruneError), alike(_REFUSED, _LAST_LOOK / timedelta(minutes=1)):
                pass
        raise


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
            world = min(int(one.get("WORLD_SIZE", world)) for one in found)
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
    if first != other and _REFUSED in (first, other):
        return f"rank {0 if first == _REFUSED else rank} refused its command line; see what it said"
    for name in {**first, **other}:
        if first.get(name) != other.get(name):
            return (
                f"{name} differs between ranks: rank 0 has {first.get(name)}, rank {rank} has "
                f"{other.get(name)}; start every rank with the same command"
            )
    return None
