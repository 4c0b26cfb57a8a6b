"""``train`` on process groups: the same run at every layout, resumed at any other.

One launch of four processes runs all commands; what they left is looked at here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, told, weights, words
from tests.launch import made_once

TP3 = ("--tensor-model-parallel-size", 3)
PP2 = ("--pipeline-model-parallel-size", 2)
TP2 = ("--tensor-model-parallel-size", 2)
CP2 = ("--context-parallel-size", 2)
TP4 = ("--tensor-model-parallel-size", 4)
TP2_PP2 = (*TP2, *PP2)
SPLIT = ("--use-distributed-optimizer",)
SP = ("--sequence-parallel",)
EOD = ("--eod-mask-loss",)
HALF = ("--exit-interval", 2)
QUICK = (
    *("--train-iters", 4, "--micro-batch-size", 1, "--global-batch-size", 2),
    *("--save-interval", 4, "--eval-interval", 2, "--distributed-timeout-minutes", 1),
)
# name -> kind or run to load, ranks, flags; in this order
RUNS: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "alone": ("gqa", 1, ()),
    "tp3": ("gqa", 3, TP3),
    "pp2": ("gqa", 2, PP2),
    "dp2-split": ("gqa", 2, SPLIT),
    "pp2-dp2-split": ("gqa", 4, (*PP2, *SPLIT)),
    "cp2": ("gqa", 2, CP2),
    "cp2-dp2-split": ("gqa", 4, (*CP2, *SPLIT)),
    "eod-alone": ("gqa", 1, EOD),
    "eod-cp2": ("gqa", 2, (*CP2, *EOD)),
    "half-alone": ("gqa", 1, HALF),
    "half-tp3": ("gqa", 3, (*TP3, *HALF)),
    "half-dp2-split": ("gqa", 2, (*SPLIT, *HALF)),
    "half-cp2": ("gqa", 2, (*CP2, *HALF)),
    "tp3-from-alone": ("half-alone", 3, TP3),
    "pp2-from-tp3": ("half-tp3", 2, PP2),
    "alone-from-tp3": ("half-tp3", 1, ()),
    "tp3-split-from-dp2": ("half-dp2-split", 3, (*TP3, *SPLIT)),
    "pp2-dp2-from-dp2-split": ("half-dp2-split", 4, (*PP2, *SPLIT)),
    "tp3-from-cp2": ("half-cp2", 3, TP3),
    "bf16-alone": ("gqa", 1, ("--bf16",)),
    "bf16-half": ("gqa", 3, (*TP3, "--bf16", *HALF)),
    "bf16-from-tp3": ("bf16-half", 2, ("--bf16", *PP2)),
    "four-alone": ("qwen_tied", 1, ()),
    "four-tp2-pp2": ("qwen_tied", 4, TP2_PP2),
    "four-tp2-dp2": ("qwen_tied", 4, TP2),
    "four-pp2-dp2": ("qwen_tied", 4, PP2),
    "four-cp4": ("qwen_tied", 4, ("--context-parallel-size", 4)),
    "four-tp2-cp2-sp": ("qwen_tied", 4, (*TP2, *CP2, *SP)),
    "four-pp2-cp2": ("qwen_tied", 4, (*PP2, *CP2)),
    "four-dp4-split": ("qwen_tied", 4, (*SPLIT, "--global-batch-size", 4)),
    "four-alone-4": ("qwen_tied", 1, ("--global-batch-size", 4)),
    "four-tp4-sp": ("qwen_tied", 4, (*TP4, *SP)),
    "four-tp2-pp2-sp": ("qwen_tied", 4, (*TP2_PP2, *SP)),
    "four-tp2-dp2-sp-split": ("qwen_tied", 4, (*TP2, *SP, *SPLIT)),
    "qwen3-alone": ("qwen3_tied", 1, ()),
    "qwen3-tp2-sp": ("qwen3_tied", 2, (*TP2, *SP)),
    "random-alone": ("tied", 1, ("--init-random",)),
    "random-tp3": ("tied", 3, ("--init-random", *TP3)),
}
AGAIN = {  # broken off once, then the same command again
    "again-tp3": ("gqa", 3, (*TP3,)),
    "again-pp2-dp2-split": ("gqa", 4, (*PP2, *SPLIT)),
}
UNBROKEN = {"again-tp3": "tp3", "again-pp2-dp2-split": "pp2-dp2-split"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "train-on-ranks") as (folder, fresh):
        if fresh:
            jobs = _jobs(folder, reference, corpus)
            codes = dict(zip([name for name, _ in jobs], launch([j for _, j in jobs], folder)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _jobs(folder: Path, reference: Path, corpus: Path) -> list[tuple[str, Job]]:
    def job(save: str, load: str, ranks: int, flags: tuple[object, ...], **more: str) -> Job:
        start = folder / load if load in (*RUNS, "resharded") else reference / load
        flags = (
            *QUICK,
            *flags,
            "--tokenizer-model",
            reference / "gqa",
        )  # the corpus is of this one
        given: dict[str, Any] = {"words": words(start, folder / save, corpus, *flags), **more}
        return Job(check="command", world=ranks, given=given)

    jobs = [(name, job(name, *what)) for name, what in RUNS.items()]
    for name, (load, ranks, flags) in AGAIN.items():
        jobs.append((f"{name}-1", job(name, load, ranks, (*flags, *HALF))))
        jobs.append((f"{name}-2", job(name, load, ranks, flags)))
    reshard = ("reshard", "--load", folder / "half-dp2-split", "--save", folder / "resharded")
    flags = {"words": [*map(str, (*reshard, *TP3))]}
    jobs.append(("resharded", Job(check="command", world=2, given=flags)))
    jobs.append(("tp3-from-resharded", job("tp3-from-resharded", "resharded", 3, (*TP3, *SPLIT))))
    jobs.append(("disagree", job("disagree", "gqa", 2, (), rank1="--seed 6")))
    return jobs


def _norms(save: Path) -> list[float]:
    return [row["grad-norm"] for row in told(save) if "grad-norm" in row]


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    bad = {name: found for name, found in codes.items() if set(found) != {0}}
    assert list(bad) == ["disagree"], bad


def test_a_resharded_run_goes_on_to_the_bit(runs: Path) -> None:
    ours, theirs = runs / "tp3-split-from-dp2", runs / "tp3-from-resharded"
    assert losses(theirs) == losses(ours) and list(losses(theirs)) == [3, 4]
    wanted, found = weights(ours), weights(theirs)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


ALIKE = {  # -> the run of one process
    **dict.fromkeys(["tp3", "pp2", "dp2-split", "pp2-dp2-split"], "alone"),
    **dict.fromkeys(["cp2", "cp2-dp2-split"], "alone"),
    "eod-cp2": "eod-alone",
    **dict.fromkeys(["four-cp4", "four-tp2-cp2-sp", "four-pp2-cp2"], "four-alone"),
    **dict.fromkeys(["four-tp2-pp2", "four-tp2-dp2", "four-pp2-dp2"], "four-alone"),
    **dict.fromkeys(["four-tp4-sp", "four-tp2-pp2-sp", "four-tp2-dp2-sp-split"], "four-alone"),
    "four-dp4-split": "four-alone-4",
    "qwen3-tp2-sp": "qwen3-alone",
}


@pytest.mark.parametrize("name", ALIKE)
def test_every_layout_trains_alike(runs: Path, name: str) -> None:
    alone = runs / ALIKE[name]
    assert losses(runs / name) == pytest.approx(losses(alone), abs=1e-4)
    norms = [_norms(run) for run in (runs / name, alone)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    ours, theirs = weights(alone), weights(runs / name)
    assert all((ours[key] - theirs[key]).abs().max() < 1e-3 for key in ours)


@pytest.mark.parametrize(
    ("name", "unbroken", "tolerance"),
    [
        ("tp3-from-alone", "alone", 1e-4),
        ("pp2-from-tp3", "alone", 1e-4),
        ("alone-from-tp3", "alone", 1e-4),
        ("tp3-split-from-dp2", "alone", 1e-4),
        ("pp2-dp2-from-dp2-split", "alone", 1e-4),
        ("tp3-from-cp2", "alone", 1e-4),
        ("bf16-from-tp3", "bf16-alone", 2e-2),
    ],
)
def test_a_run_continues_at_another_layout(
    runs: Path, name: str, unbroken: str, tolerance: float
) -> None:
    wanted = {n: x for n, x in losses(runs / unbroken).items() if n > 2}
    assert losses(runs / name) == pytest.approx(wanted, abs=tolerance)


@pytest.mark.parametrize("name", UNBROKEN)
def test_resume_is_bitwise_on_ranks(runs: Path, name: str) -> None:
    assert told(runs / name) == told(runs / UNBROKEN[name])
    ours, theirs = weights(runs / name), weights(runs / UNBROKEN[name])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_random_weights_do_not_depend_on_the_layout(runs: Path) -> None:
    wanted, found = losses(runs / "random-alone"), losses(runs / "random-tp3")
    assert found[1] == pytest.approx(wanted[1], abs=1e-6)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert found[1] != pytest.approx(losses(runs / "four-alone")[1], abs=1e-2)


def test_ranks_with_other_arguments_all_refuse(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")["disagree"]
    assert codes == [2, 2]
    assert not (runs / "disagree").exists()
