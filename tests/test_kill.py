"""kill -9 at random moments of convert, prune and reshard (F1): nothing lost, nothing mixed.

Outputs are the same bytes in every run, so "whole" means equal to an unbroken run's directory.
A process that has imported everything forks one child a run, which is killed at a
random moment; only runs that had not ended by then count.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import pico
from tests.emb_pruner.models import write_vocab_plan
from tests.pico import directory_bytes, ok

_FORKS = """
import json, os, sys, traceback
from transformers import AutoTokenizer
import emb_pruner.prune
from megatron_prune.cli import convert, main, prune
from megatron_prune.stages import resharding
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            code = main(json.loads(line))
        except BaseException:
            traceback.print_exc()
            code = 99
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Runs:
    """Runs of stages that can be killed."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", _FORKS]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **pipes)

    def run(self, argv: list[str], kill_after_seconds: float | None = None) -> int:
        """The exit code; -9 when it was killed in time."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(argv) + "\n")
        process.stdin.flush()
        child = int(process.stdout.readline())
        if kill_after_seconds is not None:
            time.sleep(kill_after_seconds)
            with suppress(ProcessLookupError):  # it was done already
                os.kill(child, signal.SIGKILL)
        return int(process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    runs = Runs()
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of 20 MB, large enough to be killed while they are written, and their shards."""
    root = tmp_path_factory.mktemp("kill")
    sizes = {"hidden_size": 192, "intermediate_size": 768, "vocab_size": 4096, "head_dim": 32}
    for kind in ("gqa", "twin"):
        pico.make_model(root / kind, kind, num_hidden_layers=6, **sizes)
        to = ("--to", "megatron", "--ckpt-format", "torch", "--tensor-model-parallel-size", 3)
        ok("convert", "--load", root / kind, "--save", root / f"{kind}-3", *to)
    write_vocab_plan(root / "gqa", 300, root / "vocab_plan.json")
    return root


STAGES = {
    "convert": ("convert", "{kind}", "--to", "hf", "--max-shard-size", "2MB"),
    "prune": (
        *("prune", "{kind}-3", "--to", "megatron", "--tensor-model-parallel-size", "3"),
        *("--ffn-hidden-size-remain", "600", "--drop-layers", "2"),
    ),
    "reshard": ("reshard", "{kind}-3", "--pipeline-model-parallel-size", "2"),
    "prune the vocabulary too": (
        *("prune", "{kind}-3", "--to", "hf", "--vocab-plan", "{place}/vocab_plan.json"),
        *("--ffn-hidden-size-remain", "600"),
    ),
}


def kill_at_random(stage: str, place: Path, out: Path, runs: Runs, times: int) -> None:
    def argv(kind: str, *more: str) -> list[str]:
        name, source, *flags = STAGES[stage]
        load = ("--load", str(place / source.format(kind=kind)))
        filled = [flag.format(place=place) for flag in flags]
        return [name, *load, "--save", str(out), *filled, *more]

    def left() -> list[str]:
        return [path.name for path in out.parent.iterdir() if path != out]

    wanted, rng, killed, seconds = {}, random.Random(1), 0, 60.0
    for kind in ("gqa", "twin"):
        began = time.perf_counter()
        assert runs.run(argv(kind, "--overwrite")) == 0
        seconds = min(seconds, time.perf_counter() - began)
        wanted[kind] = directory_bytes(out)
    assert wanted["gqa"] != wanted["twin"] and left() == []
    for number in range(4 * times):
        if killed == times:
            break
        # half of the runs find the other model's output in place and are to replace it
        replace = number % 2 == 1
        there = directory_bytes(out) if out.exists() else None
        kind = "gqa" if there == wanted["twin"] else "twin"
        if not replace and there is not None:
            for path in sorted(out.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            out.rmdir()
            there = None
        code = runs.run(argv(kind, "--overwrite"), rng.uniform(0.02, 0.95) * seconds)
        assert code in (-9, 0)
        killed += code == -9
        seconds *= 1 if code else 0.8  # done before the kill: the machine is faster now
        if out.exists():  # whole: the new one, or the one that was there
            assert directory_bytes(out) in (wanted[kind], there), f"kill {number}: mixed or lost"
        else:
            assert there is None or any(".old." in name for name in left()), f"kill {number}: lost"
        assert runs.run(argv(kind, "--overwrite")) == 0, "the run after a kill"
        assert directory_bytes(out) == wanted[kind]
        assert left() == [], "left behind after a good run"
    assert killed == times, "too few runs were killed in time for this to mean anything"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_after_four_random_kills_nothing_is_lost_or_mixed_and_the_next_run_just_works(
    stage: str, place: Path, tmp_path: Path, runs: Runs
) -> None:
    kill_at_random(stage, place, tmp_path / "out", runs, 4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_after_twenty_random_kills_nothing_is_lost_or_mixed_and_the_next_run_just_works(
    stage: str, place: Path, tmp_path: Path, runs: Runs
) -> None:
    kill_at_random(stage, place, tmp_path / "out", runs, 20)


_RACE = """
import json, os, sys, time
from pathlib import Path
from megatron_prune.cli import convert, main
argv, starts, said = json.loads(sys.argv[1])
children = []
for number in range(starts):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(said + str(number), os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        time.sleep(number % 4 * 0.01)
        os._exit(main(argv))
    children.append(child)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]))
"""


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_of_many_writers_of_one_output_one_wins_and_the_others_are_told(
    place: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """F19. With ``--overwrite`` those win that begin when another is done."""
    argv = ["convert", "--load", str(place / "gqa"), "--save", str(tmp_path / "out" / "hf")]
    given = json.dumps([[*argv, "--to", "hf", *more], 20, str(tmp_path / "said")])
    done = subprocess.run(
        [sys.executable, "-c", _RACE, given], capture_output=True, text=True, timeout=120
    )
    codes = json.loads(done.stdout)
    assert codes.count(0) == 1 or (more and 1 <= codes.count(0) < 20), codes
    for number, code in enumerate(codes):
        said = (tmp_path / f"said{number}").read_text()
        assert code in (0, 2) and "Traceback" not in said, said
        if code:
            told = re.search(r"process \d+ on \S+ is writing it; wait for it", said)
            assert told or "exists and is not empty" in said, said
    ok("convert", *argv[1:3], "--save", tmp_path / "alone", "--to", "hf")
    assert directory_bytes(tmp_path / "out/hf") == directory_bytes(tmp_path / "alone")
    assert os.listdir(tmp_path / "out") == ["hf"]
