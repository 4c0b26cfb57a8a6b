"""F1, F2: SIGKILL of a rank or of the torchrun above it, at random moments of real launches."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from tests.launch import environment
from tests.pico import directory_bytes, make_model

MARK = "MEGATRON_PRUNE_TEST_LAUNCH"
SECONDS_TO_END = 30
TP2 = ("--tensor-model-parallel-size", 2)


def _launch(words: Sequence[object], said: Path) -> tuple[subprocess.Popen[bytes], str]:
    """torchrun with two ranks in a session of its own; and what marks its processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, "-m", "megatron_prune", *map(str, words)]
    mark = secrets.token_hex(8)
    with said.open("ab") as file:
        return subprocess.Popen(
            command, env=environment(**{MARK: mark}), stdout=file, stderr=file,
            start_new_session=True,
        ), mark  # fmt: skip


def _processes(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def _ranks(mark: str) -> list[psutil.Process]:
    return [one for one in _processes(mark) if "RANK" in one.environ()]


def _wait(parent: subprocess.Popen[bytes], mark: str, said: Path) -> None:
    """Until nothing of a launch is left; it has to end by itself."""
    since = time.monotonic()
    while left := _processes(mark):
        parent.poll()
        if time.monotonic() - since > SECONDS_TO_END:
            for one in left:
                one.kill()
            raise AssertionError(f"{left} are left after {SECONDS_TO_END} s: {said.read_text()}")
        time.sleep(0.1)
    parent.wait()


def _contents(path: Path) -> object:
    return directory_bytes(path) if path.is_dir() else path.read_bytes()


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, tuple[object, ...]]:
    """The commands, but for what they save."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog while 12 engineers prune. " * 40)
    model = make_model(tmp_path / "four", "four", vocab_size=512)
    given = ("--load", model, "--data", text, "--num-samples", 8, "--seq-length", 24)
    plan = ("--ffn-hidden-size-remain", 60)
    return {
        "score": ("score", *given, *TP2, "--criterion", "wanda"),
        "repair": ("prune", *given, *plan, "--repair", "--to", "hf"),
        "rounds": ("plan", *given, *TP2, *plan, "--rounds", 3, "--criterion", "ffn=wanda"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["score", "repair", "rounds"])
@pytest.mark.parametrize("killed", ["rank", "torchrun"])
def test_after_kills_nothing_is_left_and_the_next_run_just_works(
    stages: dict[str, tuple[object, ...]], stage: str, killed: str, tmp_path: Path
) -> None:
    rng, said = random.Random(f"{stage} {killed}"), tmp_path / "said.txt"
    out = tmp_path / "out" / ("model" if stage == "repair" else "file")
    out.parent.mkdir()
    words = (*stages[stage], "--save", out)
    began = time.monotonic()
    parent, mark = _launch(words, said)
    assert parent.wait() == 0, said.read_text()
    seconds, wanted = time.monotonic() - began, _contents(out)
    hits = 0
    for number in range(int(os.environ.get("KILLS", "10"))):
        for path in sorted(out.parent.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        parent, mark = _launch(words, said)
        time.sleep(rng.uniform(0.3, 0.95) * seconds)
        ranks = _ranks(mark)
        if killed == "torchrun":
            parent.kill()
            hits += 1
        elif ranks:
            rng.choice(ranks).send_signal(signal.SIGKILL)
            hits += 1
        _wait(parent, mark, said)
        if out.exists():
            assert _contents(out) == wanted, f"kill {number}"
        else:
            parent, mark = _launch(words, said)
            assert parent.wait() == 0, said.read_text()
            assert _contents(out) == wanted, f"kill {number}"
        assert [path.name for path in out.parent.iterdir()] == [out.name], f"kill {number}"
    assert hits > 5
