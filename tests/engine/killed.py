"""kill -9 of a training run at random moments, many times over.

Between two kills it looks at every checkpoint in the directory. Of a run on several ranks one is
killed, any of them, and the others are waited for.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from megatron_prune.store.commit import check_manifest
from tests.launch import COMMAND, Process, fork, fork_ranks, until, wait


def _newest(save: Path) -> int:
    return max((int(path.name[5:]) for path in save.glob("iter_*")), default=0)


def _run_and_kill(
    words: list[str], save: Path, said: Path, rng: random.Random, ranks: int, in_a_save: bool
) -> list[int]:
    """Start a run and kill one rank some time after it has saved once; how each ended.

    Args:
        in_a_save: the kill comes while a checkpoint is being written, however fast the machine is:
            the ranks are stopped to look for one, and go on when there is none.
    """
    before = _newest(save)
    running = fork_ranks(COMMAND, [words] * ranks, [(said, said)] * ranks)
    until(lambda: _newest(save) > before, running)
    time.sleep(rng.uniform(0, 0.3))

    def is_in_a_save() -> bool:
        for process in running:
            os.kill(process.pid, signal.SIGSTOP)
        if found := any(save.glob(".iter_*")):
            return True
        for process in running:
            os.kill(process.pid, signal.SIGCONT)
        return found

    if in_a_save:
        until(is_in_a_save, running)
    os.killpg(rng.choice(running).pid, signal.SIGKILL)
    for process in running:
        os.kill(process.pid, signal.SIGCONT)
    return wait(running)


def kill_many(words: list[str], save: Path, times: int, ranks: int = 1) -> list[dict[str, Any]]:
    """What lay there after each kill, and how the ranks ended."""
    rng, seen = random.Random(4), []
    for number in range(times):
        said = save.parent / "said-before-kills"
        codes = _run_and_kill(words, save, said, rng, ranks, in_a_save=number % 2 == 1)
        found = sorted(save.glob("iter_*"))
        damage = [difference for path in found for difference in check_manifest(path)]
        left = [path.name for path in save.glob(".iter_*")]
        one = {"newest": _newest(save), "damage": damage, "left": left, "codes": sorted(codes)}
        seen.append(one)
    return seen


def start_many(words: list[str], save: Path, starts: int) -> dict[str, Any]:
    """Start one command many times at once, stop what still runs; who won, and all exit codes."""
    said, metrics = save.parent / "said", save / "metrics.jsonl"
    processes: list[Process] = [fork(COMMAND, words, (said, said)) for _ in range(starts)]

    def running() -> list[Process]:
        return [process for process in processes if process.poll() is None]

    until(lambda: len(running()) <= 1, processes)
    (winner,) = running()
    until(lambda: metrics.exists() and bool(metrics.read_text()), processes)
    winner.send_signal(signal.SIGTERM)
    return {"winner": winner.pid, "codes": wait(processes)}
