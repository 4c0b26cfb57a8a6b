"""Saving behind training: the same files, whole, and training does not wait for the disk."""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path

import pytest

from megatron_prune.files import HashedFile
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, told, words
from tests.engine.wrong_steps import wrong_steps
from tests.pico import directory_bytes, ok, refused


def _checkpoints(save: Path) -> dict[str, dict[str, str]]:
    """Weights and optimizer state of every checkpoint, as they lie on disk."""
    return {
        path.name: {n: d for n, d in directory_bytes(path).items() if n.endswith(".distcp")}
        for path in save.glob("iter_*")
    }


@pytest.mark.parametrize(
    "flags", [(), ("--bf16", "--use-distributed-optimizer"), ("--save-interval", 1)], ids=str
)
def test_the_files_are_those_of_a_save_that_training_waits_for(
    tmp_path: Path, reference: Path, corpus: Path, flags: tuple[object, ...]
) -> None:
    """The state is that of the save's iteration, whatever training did since."""
    waits, overlaps = tmp_path / "waits", tmp_path / "overlaps"
    ok(*words(reference / "gqa", waits, corpus, *flags))
    done = ok(*words(reference / "gqa", overlaps, corpus, *flags, "--async-save"))
    assert _checkpoints(overlaps) == _checkpoints(waits)
    assert told(overlaps) == told(waits)
    assert (overlaps / "latest_checkpointed_iteration.txt").read_text() == "6"
    assert "training stood still for" in done.err


def test_training_goes_on_while_a_slow_disk_is_written(
    tmp_path: Path, reference: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = HashedFile.write
    save, waits = tmp_path / "run", tmp_path / "waits"

    @cache
    def has_gone_on() -> bool:
        """Whether training made its third step, after the save; that is waited for, a minute."""
        since = time.monotonic()
        while time.monotonic() - since < 60:
            if 3 in losses(save):
                return True
            time.sleep(0.01)
        return False

    def slow(self: HashedFile, data: bytes | memoryview) -> int:
        has_gone_on()
        return write(self, data)

    flags = ("--train-iters", 20, "--save-interval", 2, "--eval-iters", 0)
    ok(*words(reference / "gqa", waits, corpus, *flags))
    monkeypatch.setattr(HashedFile, "write", slow)
    done = ok(*words(reference / "gqa", save, corpus, *flags, "--async-save", "--exit-interval", 4))
    saved = re.findall(r"saved \S+ in (\S+) s, training stood still for (\S+) s", done.err)
    assert len(saved) == 2
    whole, stalled = map(float, saved[0])
    lines = done.err.splitlines()
    first = next(n for n, line in enumerate(lines) if "saved" in line)
    assert has_gone_on(), "training waited for the disk"
    assert "iteration 3/20" in "\n".join(lines[:first])
    assert stalled < whole
    assert _checkpoints(save) == {
        name: files for name, files in _checkpoints(waits).items() if int(name[5:]) <= 4
    }


def test_a_run_that_stops_for_its_loss_keeps_the_save_under_way(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save = tmp_path / "run"
    flags = ("--async-save", "--eval-iters", 0)
    with wrong_steps({4: "loss"}):
        refused(*words(reference / "gqa", save, corpus, *flags), says="iteration 3 is kept", code=3)
    assert [path.name for path in save.glob("*iter_*")] == ["iter_0000003"]


def test_ranks_save_behind_training_alike(tmp_path: Path, reference: Path, corpus: Path) -> None:
    flags = ("--save-interval", 1, "--distributed-timeout-minutes", 1)
    flags = (*flags, "--use-distributed-optimizer", "--pipeline-model-parallel-size", 2)
    jobs = [
        Job(
            check="command",
            world=4,
            given={"words": words(reference / "gqa", tmp_path / name, corpus, *flags, *more)},
        )
        for name, more in [("waits", ()), ("overlaps", ("--async-save",))]
    ]
    assert launch(jobs, tmp_path / "jobs") == [[0] * 4] * 2
    assert losses(tmp_path / "waits") == losses(tmp_path / "overlaps")
    assert len(_checkpoints(tmp_path / "overlaps")) == 6
    assert _checkpoints(tmp_path / "waits") == _checkpoints(tmp_path / "overlaps")
