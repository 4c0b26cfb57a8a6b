"""`scripts/slurm_recover.sh` with real training; only ``srun`` and ``scontrol`` are stand-ins.

There is no Slurm here: the stand-in for ``srun`` starts the tasks and passes signals on, as its
manual says; the one for ``scontrol`` names this host and notes what is queued again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.conftest import corpus, reference  # noqa: F401 (fixtures)
from tests.engine.runs import told, words
from tests.launch import environment

REPO = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do
    case "$1" in --ntasks) tasks=$2 ; shift 2 ;; --wait=*) shift ;; *) shift 2 ;; esac
done
trap 'kill -USR1 "${pids[@]}"' USR1
trap 'kill -TERM "${pids[@]}"' TERM
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS=$tasks "$@" &
    pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do
    while :; do
        wait "$pid"; code=$?
        kill -0 "$pid" 2>/dev/null || break
    done
    wait "$pid"; code=$?
    ((code > worst)) && worst=$code
done
exit "$worst"
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) echo 127.0.0.1 ;;
    requeue) echo "$2" >>"$QUEUED" ;;
esac
"""
STEPS = ("--train-iters", 60, "--eval-interval", 20, "--save-interval", 1000)


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job of two tasks on one node."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return environment(
        PATH=f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        QUEUED=str(tmp_path / "queued"), SLURM_SUBMIT_DIR=str(REPO), SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2", SLURM_JOB_ID=str(os.getpid()), SLURM_JOB_NODELIST="here",
    )  # fmt: skip


def _submit(slurm: dict[str, str], copy: Path, command: list[str]) -> subprocess.Popen[str]:
    """Run a copy of the script, as Slurm does; ``command`` without its first word, ``train``."""
    copy.write_text((REPO / "scripts/slurm_recover.sh").read_text())
    return subprocess.Popen(
        ["bash", str(copy), *command[1:]], env=slurm, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("name", ["SIGUSR1", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_signal_saves_and_queues_again_and_the_next_slice_ends_it(
    tmp_path: Path,
    slurm: dict[str, str],
    reference: Path,  # noqa: F811
    corpus: Path,  # noqa: F811
    name: str,
) -> None:
    save, queued = tmp_path / "run", tmp_path / "queued"
    command = words(reference / "gqa", save, corpus, *STEPS)
    job = _submit(slurm, tmp_path / "slurm_script", command)
    metrics, since = save / "metrics.jsonl", time.monotonic()
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert job.poll() is None and time.monotonic() - since < 600
        time.sleep(0.01)
    job.send_signal(getattr(signal, name))
    _, said = job.communicate(timeout=600)
    assert job.returncode == 0 and "exit 75; back into the queue" in said, said
    assert queued.read_text() == slurm["SLURM_JOB_ID"] + "\n"
    assert 0 < int((save / "latest_checkpointed_iteration.txt").read_text()) < 60
    job = _submit(slurm, tmp_path / "slurm_script", command)
    _, said = job.communicate(timeout=600)
    assert job.returncode == 0 and queued.read_text().count("\n") == 1, said
    assert told(save)[-1]["iteration"] == 60


@pytest.mark.slow
def test_errors_are_queued_again_only_when_told_to_and_not_without_end(
    tmp_path: Path,
    slurm: dict[str, str],
    reference: Path,  # noqa: F811
) -> None:
    """A refusal: 2 on the rank that found it and on the other; then 2 of the command line alone."""
    command = words(reference / "gqa", tmp_path / "run", tmp_path / "nowhere")
    typo = [*command, "--train-iters", "nowhere"]  # seen before anything is imported
    for count, retried, code in (("0", "75 5", 2), ("2", "75 2", 0), ("3", "75 2", 2)):
        more = {"REQUEUE_ON": retried, "MAX_RESTARTS": "3", "SLURM_RESTART_COUNT": count}
        words_of_it = command if count == "0" else typo
        job = _submit({**slurm, **more}, tmp_path / "slurm_script", words_of_it)
        _, said = job.communicate(timeout=600)
        assert job.returncode == code and "nowhere" in said, said
        assert (tmp_path / "queued").exists() == (code == 0)
        (tmp_path / "queued").unlink(missing_ok=True)
