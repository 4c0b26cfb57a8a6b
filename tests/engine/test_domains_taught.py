"""``train --domains --teacher``: both at once, on process groups, resumed to the bit.

One launch of two processes runs all commands; what they left is looked at here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_prune.engine.train.checkpoint import training_state
from tests.engine import domain_runs
from tests.engine.domain_runs import tables, write_recipe
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, rows, told
from tests.launch import made_once
from tests.pico import directory_bytes, make_model

PP2 = ("--pipeline-model-parallel-size", 2)
HIDDEN = ("--distill-hidden-weight", 0.5, "--distill-hidden-layers", "0:1,3:4")
CONSTANT = ("--domain-weighting", "constant")
# name -> ranks, with the teacher, flags, the run of one process that it equals
RUNS: dict[str, tuple[int, bool, tuple[object, ...], str | None]] = {
    "alone": (1, True, (), None),
    "pp2": (2, True, PP2, "alone"),
    "dp2": (2, True, ("--use-distributed-optimizer",), "alone"),
    "hidden": (1, True, HIDDEN, None),
    "hidden-dp2": (2, True, HIDDEN, "hidden"),
    "constant": (1, True, CONSTANT, None),
    "untaught": (1, False, CONSTANT, None),
}
RESUMED = ("pp2", "hidden-dp2")
STOPS = (1, 3)  # between two updates, and after one


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpora: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "domains-taught") as (folder, fresh):
        if fresh:
            larger = {"hidden_size": 60, "num_hidden_layers": 5, "intermediate_size": 120}
            make_model(folder / "teacher", "twin", **larger)
            recipe = write_recipe(folder / "r.yaml", domain_runs.domain_rows(corpora))
            jobs = _jobs(folder, reference / "gqa", recipe)
            codes = dict(zip([name for name, _ in jobs], launch([j for _, j in jobs], folder, 2)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _jobs(folder: Path, student: Path, recipe: Path) -> list[tuple[str, Job]]:
    def job(name: str, save: str, *more: object) -> Job:
        ranks, taught, flags, _ = RUNS[name]
        teacher = ("--teacher", folder / "teacher", "--distill-lm-weight", 0.3) if taught else ()
        every = (*flags, *teacher, "--distributed-timeout-minutes", 1, *more)
        words = domain_runs.words(student, folder / save, recipe, *every)
        return Job(check="command", world=ranks, given={"words": words})

    jobs = [(name, job(name, name)) for name in RUNS]
    for name in RESUMED:
        for stop in STOPS:
            jobs.append((f"{name}-{stop}", job(name, f"again-{name}", "--exit-interval", stop)))
        jobs.append((f"{name}-end", job(name, f"again-{name}")))
    return jobs


def _all(save: Path, name: str) -> list[float]:
    return [row[name] for row in rows(save) if name in row]


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[3]])
def test_a_layout_trains_as_one_process(runs: Path, name: str) -> None:
    alone, found = runs / str(RUNS[name][3]), runs / name
    assert losses(found) == pytest.approx(losses(alone), abs=1e-4)
    for loss in ("kl loss", "hidden loss", "validation loss"):
        assert _all(found, loss) == pytest.approx(_all(alone, loss), abs=1e-4)
    assert list(tables(found)) == list(tables(alone)) == [2, 3, 4, 6]
    for iteration, table in tables(found).items():
        for domain, row in table.items():
            assert row == pytest.approx(tables(alone)[iteration][domain], abs=1e-4)


def test_the_teacher_changes_no_sample_and_no_measure_before_it_has_taught(runs: Path) -> None:
    """Of constant weights: the same draws; the first step's LM loss is the student's alone."""
    taught, untaught = runs / "constant", runs / "untaught"
    assert losses(taught)[1] == pytest.approx(losses(untaught)[1], abs=1e-6)
    assert losses(taught)[6] != pytest.approx(losses(untaught)[6], abs=1e-3)
    states = [training_state(save / "iter_0000006")["domains"] for save in (taught, untaught)]
    assert states[0] == states[1]
    assert len(_all(taught, "kl loss")) == 6 and not _all(untaught, "kl loss")


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_bitwise(runs: Path, name: str) -> None:
    again, whole, last = runs / f"again-{name}", runs / name, "iter_0000006"
    assert told(again) == told(whole)
    assert training_state(again / last) == training_state(whole / last)
    kept = [
        {n: d for n, d in directory_bytes(save / last).items() if n.endswith(".distcp")}
        for save in (again, whole)
    ]
    assert kept[0] == kept[1] and kept[0]
