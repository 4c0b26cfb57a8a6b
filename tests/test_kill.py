"""kill -9 at random moments of convert, prune and reshard (F1): nothing lost, nothing mixed.

Outputs are the same bytes in every run, so "whole" means equal to an unbroken run's directory.
A run is killed at a random moment; only runs that had not ended by then count.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from tests import pico
from tests.emb_pruner.models import write_vocab_plan
from tests.launch import COMMAND, fork, seconds_of_a_core, until, wait
from tests.pico import directory_bytes, ok


def run(argv: list[str], kill_after_cpu_seconds: float | None = None) -> tuple[int, float]:
    """The exit code, -9 when it was killed in time, and the seconds of a core it took.

    By what it has done, not by the clock: a busy machine kills it at the same places.
    """
    null = Path(os.devnull)
    process, spent = fork(COMMAND, argv, (null, null)), 0.0

    def is_over() -> bool:
        nonlocal spent
        if process.poll() is not None:
            return True
        spent = seconds_of_a_core(process.pid)
        return kill_after_cpu_seconds is not None and spent >= kill_after_cpu_seconds

    until(is_over, [process], pause_seconds=0.001)
    process.kill()
    return process.wait(), spent


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


def kill_at_random(stage: str, place: Path, out: Path, times: int) -> None:
    def argv(kind: str, *more: str) -> list[str]:
        name, source, *flags = STAGES[stage]
        load = ("--load", str(place / source.format(kind=kind)))
        filled = [flag.format(place=place) for flag in flags]
        return [name, *load, "--save", str(out), *filled, *more]

    def left() -> list[str]:
        return [path.name for path in out.parent.iterdir() if path != out]

    wanted, rng, killed, seconds = {}, random.Random(1), 0, 60.0
    for kind in ("gqa", "twin"):
        code, spent = run(argv(kind, "--overwrite"))
        assert code == 0
        seconds = min(seconds, spent)
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
        code, _ = run(argv(kind, "--overwrite"), rng.uniform(0.02, 0.95) * seconds)
        assert code in (-9, 0)
        killed += code == -9
        seconds *= 1 if code else 0.8  # done before the kill: it took less this time
        if out.exists():  # whole: the new one, or the one that was there
            assert directory_bytes(out) in (wanted[kind], there), f"kill {number}: mixed or lost"
        else:
            assert there is None or any(".old." in name for name in left()), f"kill {number}: lost"
        assert run(argv(kind, "--overwrite"))[0] == 0, "the run after a kill"
        assert directory_bytes(out) == wanted[kind]
        assert left() == [], "left behind after a good run"
    assert killed == times, "too few runs were killed in time for this to mean anything"


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_after_four_random_kills_nothing_is_lost_or_mixed_and_the_next_run_just_works(
    stage: str, place: Path, tmp_path: Path
) -> None:
    kill_at_random(stage, place, tmp_path / "out", 4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", sorted(STAGES))
def test_after_twenty_random_kills_nothing_is_lost_or_mixed_and_the_next_run_just_works(
    stage: str, place: Path, tmp_path: Path
) -> None:
    kill_at_random(stage, place, tmp_path / "out", 20)


@pytest.mark.parametrize("more", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_of_many_writers_of_one_output_one_wins_and_the_others_are_told(
    place: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """F19. With ``--overwrite`` those win that begin when another is done."""
    argv = ["convert", "--load", str(place / "gqa"), "--save", str(tmp_path / "out" / "hf")]
    running = []
    for number in range(20):
        said = tmp_path / f"said{number}"
        running.append(fork(COMMAND, [*argv, "--to", "hf", *more], (said, said)))
    codes = wait(running)
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
