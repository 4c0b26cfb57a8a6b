"""Stages in several processes that share a rendezvous, as torchrun starts them, without torchrun.

Starting a process costs seconds and running a stage on a pico model milliseconds, so one launch
runs a list of stages, each with a rendezvous of its own.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

_SCRIPT = """
import json, os, sys
from megatron_prune.cli import main
prelude, stages = json.loads(sys.argv[1])
exec(prelude)
codes = []
for port, argv in stages:
    os.environ["MASTER_PORT"] = str(port)
    codes.append(main(argv))
print("codes", json.dumps(codes))
"""


@dataclass(frozen=True)
class RankDone:
    """How one rank ended: the exit code of each stage it got to, and what it said."""

    codes: list[int]
    out: str
    err: str


@contextmanager
def made_once(factory: pytest.TempPathFactory, name: str) -> Iterator[tuple[Path, bool]]:
    """A folder that all of xdist's workers share, and whether this one has to fill it."""
    shared = factory.getbasetemp()
    shared = shared.parent if shared.name.startswith("popen-") else shared
    with FileLock(f"{shared / name}.lock"):
        fresh = not (shared / name).exists()
        (shared / name).mkdir(exist_ok=True)
        yield shared / name, fresh


def free_port() -> int:
    """A port that nothing listens on, below those the system gives to outgoing connections."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)):
                return port


def start(commands: Sequence[Sequence[str]], timeout: float, **environment: str) -> list[RankDone]:
    """Run one command a rank, as torchrun would start them, and wait for all."""
    running = []
    for rank, command in enumerate(commands):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(commands)),
            "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environ = {**os.environ, **place, **environment}
        running.append(subprocess.Popen(command, env=environ, **pipes))
    done = []
    try:
        for process in running:
            out, err = process.communicate(timeout=timeout)
            last = out.strip().splitlines()[-1:] or [""]
            codes = json.loads(last[0][6:]) if last[0].startswith("codes ") else []
            done.append(RankDone(codes, out, err))
    finally:
        for process in running:
            process.kill()
    return done


def launch(
    processes: int,
    *stages: Sequence[object],
    prelude: str = "",
    instead: dict[int, Sequence[object]] | None = None,
    timeout: float = 120,
) -> list[RankDone]:
    """Run ``stages`` on every rank.

    Args:
        prelude: code that every process runs first; it can look at ``os.environ["RANK"]``.
        instead: rank -> a stage that it runs in place of all ``stages``.
    """
    ports = [free_port() for _ in stages]
    commands = []
    for rank in range(processes):
        mine = [(instead or {}).get(rank, argv) for argv in stages]
        texts = [[port, [str(word) for word in argv]] for port, argv in zip(ports, mine)]
        commands.append([sys.executable, "-c", _SCRIPT, json.dumps([prelude, texts])])
    return start(commands, timeout)
