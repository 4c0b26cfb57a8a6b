"""Signals, kills and lost ranks: nothing is lost, and the same command continues."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path

import pytest

from megatron_prune.store.commit import check_manifest
from megatron_prune.store.mcore_dist import COMMON
from megatron_prune.store.untrusted import load_untrusted
from tests.engine import domain_runs, killed
from tests.engine.domain_runs import write_recipe
from tests.engine.runs import losses, told, words
from tests.launch import Process, fork_and_wait, made_once, start, until, wait
from tests.pico import directory_bytes, ok

STEPS = ("--train-iters", 30, "--save-interval", 1000, "--eval-interval", 10)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """A run of `STEPS` that nothing disturbs."""
    with made_once(tmp_path_factory, "unbroken") as (folder, fresh):
        if fresh:
            ok(*words(reference / "gqa", folder / "run", corpus, *STEPS))
    return folder / "run"


def _wait_for(save: Path, iterations: int, processes: list[Process]) -> None:
    """Until so many more are told of."""
    metrics = save / "metrics.jsonl"

    def told_of() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    wanted = told_of() + iterations

    def is_there() -> bool:
        assert processes[0].poll() is None, "ended before it could be disturbed"
        return told_of() >= wanted

    until(is_there, processes)


def test_a_signal_saves_and_the_same_command_continues_to_the_bit(
    tmp_path: Path, reference: Path, corpus: Path, unbroken: Path
) -> None:
    """One run, stopped three times, each time by another signal."""
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, *STEPS)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        (process,) = start(command, 1, tmp_path / name)
        _wait_for(save, 3, [process])
        process.send_signal(getattr(signal, name))
        assert process.wait() == 75
        said = (tmp_path / name).read_text()
        assert f"stopped by {name} after iteration" in said and "Traceback" not in said
        kept = max(save.glob("iter_*"))
        assert max(losses(save)) == int(kept.name[5:]) < 30
    ok(*command)
    assert told(save) == told(unbroken)


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import os, signal, time\n"
        "from megatron_prune.engine.train.signals import StopSignals\n"
        "with StopSignals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"  # torchrun's echo of the first
        "    print(stop.received, flush=True)\n"
        "    time.sleep(0.6)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still there')\n"
    )
    done = fork_and_wait({"code": program})
    assert (done.returncode, done.stdout) == (128 + 15, "SIGTERM\n"), done.stderr


def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    save = tmp_path / "run"
    processes = start(words(reference / "gqa", save, corpus, *STEPS), 2, tmp_path / "said.txt")
    _wait_for(save, 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert wait(processes) == [75, 75]
    (kept,) = save.glob("iter_*")
    assert len(losses(save)) == int(kept.name[5:]) < 30


def test_a_lost_rank_ends_the_others_and_the_checkpoint_before_it_loads(
    tmp_path: Path, reference: Path, corpus: Path, unbroken: Path
) -> None:
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, *STEPS, "--save-interval", 3)
    processes = start(command, 2, tmp_path / "said.txt")
    _wait_for(save, 5, processes)
    processes[1].kill()
    since = time.monotonic()
    assert processes[0].wait() == 5
    assert time.monotonic() - since < 15
    assert "rank 0 of 2 lost another rank" in (tmp_path / "said.txt").read_text()
    ok(*command)  # alone, where two had started
    assert losses(save) == pytest.approx(losses(unbroken), abs=1e-4)


@pytest.mark.parametrize(
    ("more", "prelude"), [((), None), (("--async-save",), "")], ids=["module", "async-script"]
)
def test_a_hung_rank_ends_the_others_within_the_timeout_and_its_checkpoint_loads(
    tmp_path: Path, reference: Path, corpus: Path, more: tuple[str, ...], prelude: str | None
) -> None:
    """F20: a rank that is stopped and does not answer; timeout + 5 s, exit 5, of both programs."""
    save, seconds = tmp_path / "run", 4
    flags = ("--train-iters", 20, "--save-interval", 3, "--eval-iters", 0, *more)
    waits = ("--distributed-timeout-minutes", seconds / 60)
    command = words(reference / "gqa", save, corpus, *flags, *waits)
    processes = start(command, 2, tmp_path / "said", prelude=prelude)
    try:
        _wait_for(save, 5, processes)
        processes[1].send_signal(signal.SIGSTOP)
        since = time.monotonic()
        assert processes[0].wait() == 5
        took = time.monotonic() - since
        assert took < seconds + 5
    finally:
        for process in processes:
            process.end()
    assert "rank 0" in (tmp_path / "said").read_text()
    whole = [path.name for path in save.glob("iter_*") if not check_manifest(path)]
    assert whole and len(whole) == len(list(save.glob("iter_*")))
    ok(*words(reference / "gqa", save, corpus, *flags))
    assert list(losses(save)) == list(range(1, 21)), "not continued from the last checkpoint"


SKIP = """
import os
if os.environ["RANK"] == "1":
    from {module} import {name} as owner
    original, calls = owner.{method}, []
    def skip(self, *given, **more):
        calls.append(1)
        return {instead} if len(calls) == {call} else original(self, *given, **more)
    owner.{method} = skip
"""
GROUPS, RANKS = "megatron_prune.engine.groups", "megatron_prune.ranks"
DDP = "megatron.core.distributed"
SKIPPED = {  # where, what it gives instead, in which of its calls
    "loss": (GROUPS, "Groups", "sum_over_ranks", "list(given)", 8),
    "gradients": (DDP, "DistributedDataParallel", "finish_grad_sync", "None", 5),
    "save": (RANKS, "Ranks", "barrier", "None", 1),
}


@pytest.mark.parametrize(
    "what", ["loss", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gradients", "save"))]
)
def test_a_rank_that_skips_an_exchange_ends_all_within_the_timeout(
    tmp_path: Path, reference: Path, corpus: Path, unbroken: Path, what: str
) -> None:
    """F20: all ranks wait for something else then; timeout + 5 s, exit 5."""
    save, seconds = tmp_path / "run", 4
    flags = (*STEPS, "--save-interval", 3, "--eval-iters", 0)
    waits = ("--distributed-timeout-minutes", seconds / 60)
    names = dict(zip(("module", "name", "method", "instead", "call"), SKIPPED[what]))
    command = words(reference / "gqa", save, corpus, *flags, *waits)
    processes = start(command, 2, tmp_path / "said", prelude=SKIP.format(**names))
    try:
        _wait_for(save, 3, processes)
        since = time.monotonic()
        codes = wait(processes)
        took = time.monotonic() - since
    finally:
        for process in processes:
            process.end()
    said = (tmp_path / "said").read_text()
    assert codes == [5, 5], said
    assert took < seconds + 5 and len(losses(save)) < 30
    assert "Traceback" not in said
    ok(*words(reference / "gqa", save, corpus, *flags))
    assert losses(save) == pytest.approx(losses(unbroken), abs=1e-4)


@pytest.mark.parametrize(("ranks", "flags"), [(1, ()), (2, ()), (2, ("--async-save",))])
def test_a_full_disk_is_exit_4_and_leaves_what_was_there(
    tmp_path: Path, reference: Path, corpus: Path, ranks: int, flags: tuple[str, ...]
) -> None:
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, "--exit-interval", 3, *flags)
    ok(*command)
    before = directory_bytes(save / "iter_0000003")
    # a checkpoint takes 1.4 MB
    codes = wait(start(command, ranks, tmp_path / "said.txt", largest_file=200_000))
    said = (tmp_path / "said.txt").read_text()
    assert codes == [4] * ranks, said
    assert "File too large" in said and "Traceback" not in said
    assert [path.name for path in save.glob("*iter_*")] == ["iter_0000003"]
    assert directory_bytes(save / "iter_0000003") == before
    ok(*command)
    assert list(losses(save)) == [1, 2, 3, 4, 5, 6]


# ranks, with --domains, flags
KILLED: dict[str, tuple[int, bool, tuple[object, ...]]] = {
    "plain": (1, False, ()),
    "async": (1, False, ("--async-save",)),
    "domains": (1, True, ("--domain-update-interval", 3)),
    "domains-async-dp2": (2, True, ("--async-save", "--use-distributed-optimizer")),
}


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("plain", 3),
        *(pytest.param(name, 20, marks=pytest.mark.slow) for name in KILLED),
    ],
)
def test_kills_at_random_moments_leave_whole_checkpoints_and_resume_is_bitwise(
    tmp_path: Path, reference: Path, corpus: Path, corpora: Path, name: str, times: int
) -> None:
    """F1, F22: against an unbroken run: weights, optimizer, schedule, data, domains, metrics."""
    ranks, has_domains, more = KILLED[name]
    save, whole = tmp_path / "run", tmp_path / "whole"
    flags = ("--train-iters", 10 * times, "--save-interval", 1, "--keep-last", 2, *more)
    if has_domains:
        data = write_recipe(tmp_path / "recipe.yaml", domain_runs.domain_rows(corpora))
    else:
        data = corpus
    command, unbroken = (
        (domain_runs.words if has_domains else words)(reference / "gqa", path, data, *flags)
        for path in (save, whole)
    )
    seen = killed.kill_many(command, save, times, ranks)
    assert [one["damage"] for one in seen] == [[]] * times
    assert [one["codes"] for one in seen] == [[-signal.SIGKILL, *[5] * (ranks - 1)]] * times
    newest = [one["newest"] for one in seen]
    assert newest == sorted(set(newest)), "a finished checkpoint was lost"
    assert any(one["left"] for one in seen), "no kill came while a checkpoint was being written"
    for path, words_of_it in ((save, command), (whole, unbroken)):
        assert wait(start(words_of_it, ranks, tmp_path / "said.txt")) == [0] * ranks, path
    assert not list(save.glob(".iter_*"))
    assert told(save) == told(whole)
    last = f"iter_{10 * times:07d}"
    states = [directory_bytes(path / last) for path in (save, whole)]
    kept = [{n: d for n, d in one.items() if n.endswith(".distcp")} for one in states]
    assert kept[0] == kept[1] and kept[0], "weights or optimizer differ from the unbroken run's"
    common = [load_untrusted(path / last / COMMON, mmap=False) for path in (save, whole)]
    assert common[0] == common[1], "schedule, position in the data or domains differ"
    assert (common[0]["training"]["domains"] is not None) == has_domains


def test_of_many_starts_on_one_directory_one_wins(
    tmp_path: Path, reference: Path, corpus: Path
) -> None:
    """F19."""
    save = tmp_path / "run"
    command = words(reference / "gqa", save, corpus, "--train-iters", 1000, "--eval-iters", 0)
    seen = killed.start_many(command, save, 20)
    assert sorted(seen["codes"]) == [2] * 19 + [75]
    said = (save.parent / "said").read_text()
    assert said.count(f"process {seen['winner']} on {socket.gethostname()} is training") == 19
    assert list(save.glob("iter_*")) and not (save / ".lock").exists()
