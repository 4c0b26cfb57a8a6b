"""kill -9 of a training run at random moments, many times over.

A process that has Megatron imported forks one run after the other, so a kill costs half a second
and not seven. Between two kills it looks at every checkpoint in the directory. Of a run on several
ranks one is killed, any of them, and the others are waited for.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from megatron_prune.cli import main
from megatron_prune.store.commit import check_manifest
from tests.engine.on_ranks import free_port


def _newest(save: Path) -> int:
    return max((int(path.name[5:]) for path in save.glob("iter_*")), default=0)


def _fork(words: list[str], rank: int, ranks: int, port: int) -> int:
    child = os.fork()
    if child == 0:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        os.setsid()
        os._exit(main(words))
    return child


def _run_and_kill(words: list[str], save: Path, rng: random.Random, ranks: int) -> list[int]:
    """Start a run and kill one rank some time after it has begun to save; how each ended."""
    port = free_port()
    children = [_fork(words, rank, ranks, port) for rank in range(ranks)]
    before, since = _newest(save), time.monotonic()
    while _newest(save) == before and time.monotonic() - since < 60:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))
    os.killpg(rng.choice(children), signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_many(words: list[str], save: Path, times: int, ranks: int = 1) -> list[dict[str, object]]:
    """What lay there after each kill, and how the ranks ended."""
    import megatron_prune.engine.train.loop  # noqa: F401 (imported once, for all runs)

    rng, seen = random.Random(4), []
    for _ in range(times):
        codes = _run_and_kill(words, save, rng, ranks)
        found = sorted(save.glob("iter_*"))
        damage = [difference for path in found for difference in check_manifest(path)]
        left = [path.name for path in save.glob(".iter_*")]
        one = {"newest": _newest(save), "damage": damage, "left": left, "codes": sorted(codes)}
        seen.append(one)
    return seen


def start_many(words: list[str], save: Path, starts: int) -> dict[str, object]:
    """Start one command many times at once, stop what still runs; who won, and all exit codes."""
    import megatron_prune.engine.train.loop  # noqa: F401 (imported once, for all runs)

    children = []
    for _ in range(starts):
        child = os.fork()
        if child == 0:
            with open(save.parent / "said", "a") as said:
                os.dup2(said.fileno(), 2)
            os._exit(main(words))
        children.append(child)
    codes: dict[int, int] = {}
    while len(codes) < starts - 1:
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
    (winner,) = set(children) - set(codes)
    metrics, since = save / "metrics.jsonl", time.monotonic()
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() - since < 120:
        time.sleep(0.01)
    os.kill(winner, signal.SIGTERM)
    codes[winner] = os.waitstatus_to_exitcode(os.waitpid(winner, 0)[1])
    return {"winner": winner, "codes": list(codes.values())}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    place = Path(given["save"])
    result = (
        start_many(given["words"], place, given["starts"])
        if "starts" in given
        else kill_many(given["words"], place, given["times"], given["ranks"])
    )
    Path(given["out"]).write_text(json.dumps(result))
