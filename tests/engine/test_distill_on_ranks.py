"""``train --teacher`` on process groups: the same run at every layout, resumed to the bit.

One launch of four processes runs all commands; what they left is looked at here. The teacher has
five layers, so that its stages differ where the student's four do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, rows, told, weights, words
from tests.launch import made_once
from tests.pico import make_model

TP2 = ("--tensor-model-parallel-size", 2)
TP3 = ("--tensor-model-parallel-size", 3)
PP2 = ("--pipeline-model-parallel-size", 2)
CP2 = ("--context-parallel-size", 2)
SP = ("--sequence-parallel", "--seq-length", 33)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", 1)  # fmt: skip
HALF = ("--exit-interval", 2)
QUICK = (
    *("--train-iters", 4, "--global-batch-size", 4, "--save-interval", 4, "--eval-interval", 2),
    *("--distributed-timeout-minutes", 1),
)
HIDDEN = ("--distill-hidden-weight", 0.5, "--distill-hidden-layers", "0:1,3:4")
MIXED = ("--distill-lm-weight", 0.3, "--distill-temperature", 2, "--distill-top-k", 50)
# name -> student, ranks, flags, the run of one process that it equals
RUNS: dict[str, tuple[str, int, tuple[object, ...], str]] = {
    "alone": ("gqa", 1, (), "alone"),
    "tp3": ("gqa", 3, TP3, "alone"),
    "pp2": ("gqa", 2, PP2, "alone"),
    "dp2": ("gqa", 2, ("--use-distributed-optimizer",), "alone"),
    "cp2": ("gqa", 2, CP2, "alone"),
    "pp2-full": ("gqa", 2, (*PP2, *FULL), "alone"),
    "mixed": ("gqa", 1, MIXED, "mixed"),
    "mixed-pp2-dp2": ("gqa", 4, (*PP2, *MIXED), "mixed"),
    "mixed-pp2-cp2": ("gqa", 4, (*PP2, *CP2, *MIXED), "mixed"),
    "hidden": ("gqa", 1, (*HIDDEN, "--seq-length", 33), "hidden"),
    "hidden-tp3": ("gqa", 3, (*HIDDEN, *TP3, "--seq-length", 33), "hidden"),
    "hidden-tp3-sp": ("gqa", 3, (*HIDDEN, *TP3, *SP), "hidden"),
    "hidden-dp2": ("gqa", 2, (*HIDDEN, "--seq-length", 33), "hidden"),
    "hidden-32": ("gqa", 1, HIDDEN, "hidden-32"),
    "hidden-cp2": ("gqa", 2, (*HIDDEN, *CP2), "hidden-32"),
    "four": ("four", 1, (), "four"),
    "four-tp2-pp2": ("four", 4, (*TP2, *PP2), "four"),
}
RESUMED = {"tp3": "gqa", "pp2": "gqa", "hidden-tp3-sp": "gqa"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, reference: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "distill-on-ranks") as (folder, fresh):
        if fresh:
            larger = {"hidden_size": 60, "num_hidden_layers": 5, "intermediate_size": 120}
            make_model(folder / "gqa-teacher", "twin", **larger)
            make_model(folder / "four-student", "four", vocab_size=379)
            make_model(folder / "four-teacher", "four", vocab_size=379, num_hidden_layers=5)
            jobs = _jobs(folder, reference, corpus)
            codes = dict(zip([name for name, _ in jobs], launch([j for _, j in jobs], folder)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _jobs(folder: Path, reference: Path, corpus: Path) -> list[tuple[str, Job]]:
    def job(name: str, save: str, *more: object) -> tuple[str, Job]:
        kind, ranks, flags, _ = RUNS[name]
        student = reference / "gqa" if kind == "gqa" else folder / "four-student"
        every = (*QUICK, "--teacher", folder / f"{kind}-teacher", *flags, *more)
        given: dict[str, Any] = {"words": words(student, folder / save, corpus, *every)}
        return save, Job(check="command", world=ranks, given=given)

    jobs = [job(name, name) for name in RUNS]
    for name in RESUMED:
        again = f"again-{name}"
        save, half = job(name, again, *HALF)
        jobs += [(f"{save}-half", half), job(name, again)]
    return jobs


def _all(save: Path, name: str) -> list[float]:
    return [row[name] for row in rows(save) if name in row]


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[3] != name])
def test_every_layout_trains_alike(runs: Path, name: str) -> None:
    alone, found = runs / RUNS[name][3], runs / name
    assert losses(found) == pytest.approx(losses(alone), abs=1e-4)
    for loss in ("kl loss", "hidden loss", "validation loss"):
        assert _all(found, loss) == pytest.approx(_all(alone, loss), abs=1e-4)
    assert _all(found, "grad-norm") == pytest.approx(_all(alone, "grad-norm"), rel=1e-3)
    ours, theirs = weights(alone), weights(found)
    assert all((ours[key] - theirs[key]).abs().max() < 1e-3 for key in ours)


def test_settings_make_other_runs(runs: Path) -> None:
    """A control: what the layouts are compared in tells runs apart."""
    first = [_all(runs / name, "kl loss")[0] for name in ("alone", "mixed", "four")]
    assert min(abs(a - b) for a, b in zip(first, [*first[1:], first[0]])) > 1e-3
    assert len(_all(runs / "hidden", "hidden loss")) == 4


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise_on_ranks(runs: Path, name: str) -> None:
    again, whole = runs / f"again-{name}", runs / name
    assert told(again) == told(whole)
    ours, theirs = weights(again), weights(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
