"""Stages in several processes that share a rendezvous, as torchrun starts them, without torchrun.

Starting a process costs seconds and running a stage on a pico model milliseconds, so one launch
runs a list of stages, each with a rendezvous of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
    running = []
    for rank in range(processes):
        mine = [(instead or {}).get(rank, argv) for argv in stages]
        texts = [[port, [str(word) for word in argv]] for port, argv in zip(ports, mine)]
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
        }  # fmt: skip
        argv = [sys.executable, "-c", _SCRIPT, json.dumps([prelude, texts])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(argv, env={**os.environ, **place}, **pipes))
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
