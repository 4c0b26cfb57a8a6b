"""Steps that are wrong are skipped, alike on all ranks, and not without end."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.engine.train.guard import StepGuard
from megatron_prune.engine.train.options import TrainOptions
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import rows, told, words
from tests.engine.wrong_steps import wrong_steps
from tests.pico import directory_bytes, ok, refused

EVERY = ("--save-interval", 1, "--eval-iters", 0)
SKIP = (*EVERY, "--skip-nonfinite", 2)


def _state_bytes(save: Path, iteration: int) -> dict[str, str]:
    found = directory_bytes(save / f"iter_{iteration:07d}")
    return {name: digest for name, digest in found.items() if name.endswith(".distcp")}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("flags", [(), ("--bf16", "--use-distributed-optimizer")], ids=str)
def test_a_skipped_step_changes_nothing_but_the_data_position(
    tmp_path: Path,
    reference: Path,
    corpus: Path,
    what: str,
    flags: tuple[str, ...],
) -> None:
    save, clean = tmp_path / "run", tmp_path / "clean"
    ok(*words(reference / "gqa", clean, corpus, *EVERY, *flags))
    with wrong_steps({3: what, 4: what}):
        done = ok(*words(reference / "gqa", save, corpus, *SKIP, *flags))
    assert done.err.count("; skipped") == 2 and "iteration 3: " in done.err
    assert _state_bytes(save, 2) == _state_bytes(clean, 2) == _state_bytes(save, 4)
    assert _state_bytes(save, 5) != _state_bytes(save, 4)
    found = {row["iteration"]: row for row in rows(save)}
    assert [found[n]["skipped-iterations"] for n in range(1, 7)] == [0, 0, 1, 1, 0, 0]
    assert [found[n]["consumed-samples"] for n in range(1, 7)] == [4, 8, 12, 16, 20, 24]
    assert found[5]["learning-rate"] == found[3]["learning-rate"] != found[6]["learning-rate"]
    assert found[3]["grad-norm"] is None
    assert (found[3]["lm loss"] is None) == (what == "loss")


def test_more_than_k_in_a_row_stop_and_the_count_goes_over_a_resume(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    bad = {2: "loss", 4: "gradient", 5: "loss", 6: "loss"}
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, *SKIP)
    with wrong_steps(bad):
        ok(*command, "--exit-interval", 5)
        refused(*command, says="iteration 6: lm loss is nan; 3 such steps in a row", code=3)
        assert sorted(path.name for path in save.glob("iter_*"))[-1] == "iter_0000005"
        refused(*words(reference / "gqa", tmp_path / "first", corpus), says="iteration 2", code=3)


def test_a_spike_is_skipped_and_resume_remembers_the_losses(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    flags = (*SKIP, "--loss-spike-factor", 2, "--loss-spike-window", 3)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with wrong_steps({2: "high", 5: "high"}):
        done = ok(*words(reference / "gqa", whole, corpus, *flags))
        for _ in range(2):
            ok(*words(reference / "gqa", broken, corpus, *flags, "--exit-interval", 4))
    assert done.err.count("; skipped") == 1, "the window was not full at iteration 2"
    assert "iteration 5: lm loss" in done.err and "the median of 3 steps" in done.err
    assert told(broken) == told(whole)
    assert _state_bytes(broken, 6) == _state_bytes(whole, 6)


def test_spikes_are_those_of_a_plain_loop() -> None:
    losses = [3.0, 2.0, 9.0, 2.5, 4.9, 2.0, 5.1, 5.0, 1.0, 4.0, 8.0, 2.0]
    options = _options(skip_nonfinite=9, loss_spike_factor=2.0, loss_spike_window=3)
    guard, found = StepGuard(options, None), []
    for loss in losses:
        wrong = guard.wrong_loss(loss)
        found.append(wrong is not None)
        assert not guard.count(wrong, loss)
        guard = StepGuard(options, guard.state())
    taken, wanted = [], []
    for loss in losses:
        spike = len(taken) >= 3 and loss > 2 * statistics.median(taken[-3:])
        wanted.append(spike)
        taken += [] if spike else [loss]
    assert found == wanted and any(wanted) and guard.take_skipped() == sum(wanted)


def _options(**more: Any) -> TrainOptions:
    return TrainOptions(
        load=None, save=Path("run"), data_path=(), train_iters=1, micro_batch_size=1, seq_length=2,
        lr=0.0, **more,
    )  # fmt: skip


def test_a_factor_without_skips_is_refused(tmp_path: Path, reference: Path, corpus: Path) -> None:
    flags = ("--loss-spike-factor", 2)
    refused(*words(reference / "gqa", tmp_path / "run", corpus, *flags), says="--skip-nonfinite K")
    flags = ("--loss-spike-factor", 0.5, "--skip-nonfinite", 1)
    refused(*words(reference / "gqa", tmp_path / "run", corpus, *flags), says="wanted 1 or more")


def test_all_ranks_skip_what_one_of_them_saw(tmp_path: Path, reference: Path, corpus: Path) -> None:
    """One rank's gradient, another's loss: at PP and between copies of the model."""
    layouts: dict[str, tuple[object, ...]] = {
        "dp": (), "pp": ("--pipeline-model-parallel-size", 2),
        "split": ("--use-distributed-optimizer",),
    }  # fmt: skip
    flags = (*SKIP, "--train-iters", 4, "--distributed-timeout-minutes", 1)
    jobs = []
    for name, layout in layouts.items():
        for rank in (0, 1):
            given = words(reference / "gqa", tmp_path / f"{name}{rank}", corpus, *flags, *layout)
            at = {2: "gradient" if rank == 0 else "loss", 3: "gradient"}
            poisoned = {"words": given, "at": at, "rank": rank}
            jobs.append(Job(check="poisoned", world=2, given=poisoned))
    assert launch(jobs, tmp_path / "jobs", ranks=2) == [[0, 0]] * len(jobs)
    for name in layouts:
        for rank in (0, 1):
            skipped = [row["skipped-iterations"] for row in rows(tmp_path / f"{name}{rank}")]
            assert skipped == [0, 1, 1, 0], name
            first, third = (_state_bytes(tmp_path / f"{name}{rank}", n) for n in (1, 3))
            assert first == third
