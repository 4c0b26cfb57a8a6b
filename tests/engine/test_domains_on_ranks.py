"""`train --domains` and `evaluate --domains` on process groups: the same samples at any layout.

One launch of four processes runs all commands; what they left is looked at here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.engine.train.checkpoint import training_state
from tests.engine import domain_runs
from tests.engine.domain_runs import make_corpora, tables, write_recipe
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses
from tests.launch import made_once

TP2 = ("--tensor-model-parallel-size", 2)
TP3 = ("--tensor-model-parallel-size", 3)
PP2 = ("--pipeline-model-parallel-size", 2)
CP2 = ("--context-parallel-size", 2)
SPLIT = ("--use-distributed-optimizer",)
# name -> ranks, flags, kind or run to load, the run of one process that it continues or equals
RUNS: dict[str, tuple[int, tuple[object, ...], str, str]] = {
    "alone": (1, (), "gqa", "alone"),
    "half": (1, ("--exit-interval", 3), "gqa", "alone"),
    "dp4-from-half": (4, (), "half", "alone"),
    "tp3-from-half": (3, TP3, "half", "alone"),
    "pp2-dp2": (4, PP2, "gqa", "alone"),
    "cp2-dp2-from-half": (4, CP2, "half", "alone"),
    "four": (1, (), "qwen_tied", "four"),
    "four-tp2": (2, (*TP2, *SPLIT, "--exit-interval", 2), "qwen_tied", "four"),
    "four-pp2-from-tp2": (2, (*PP2, *SPLIT, "--exit-interval", 4), "four-tp2", "four"),
    "four-dp2-from-pp2": (2, SPLIT, "four-pp2-from-tp2", "four"),
    "four-tp2-dp2-from-tp2": (4, (*TP2, *SPLIT), "four-tp2", "four"),
}
WHOLE = [name for name, run in RUNS.items() if "--exit-interval" not in run[1] and name != run[3]]
JUDGED = {"judged-alone": (1, ()), "judged-dp2": (2, ()), "judged-pp2-dp2": (4, PP2)}
EXACT = ("sizes", "seed", "start", "before", "consumed", "counts")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "domains-on-ranks") as (folder, fresh):
        if fresh:
            make_corpora(folder, reference / "gqa")
            recipe = write_recipe(folder / "r.yaml", domain_runs.domain_rows(folder))
            jobs = _jobs(folder, reference, recipe)
            torch.save(dict(zip([*RUNS, *JUDGED], launch(jobs, folder))), folder / "codes.pt")
    return folder


def _jobs(folder: Path, reference: Path, recipe: Path) -> list[Job]:
    model, silent = reference / "gqa", ("--distributed-timeout-minutes", 1)
    jobs = []
    for name, (ranks, flags, start, _) in RUNS.items():
        load = (folder if start in RUNS else reference) / start
        more = (*flags, *silent, "--micro-batch-size", 1)
        tokenizer = ("--tokenizer-model", model)
        words = domain_runs.words(load, folder / name, recipe, *more, *tokenizer)
        jobs.append(Job(check="command", world=ranks, given={"words": words}))
    for name, (ranks, flags) in JUDGED.items():
        words = [
            *("evaluate", "--load", model, "--domains", recipe, "--per-domain", "--seq-length", 32),
            *("--save", folder / f"{name}.json", "--split", "80,20,0", *flags, *silent),
            *("--micro-batch-size", 2),
        ]
        jobs.append(Job(check="command", world=ranks, given={"words": [str(w) for w in words]}))
    return jobs


def _state(save: Path) -> dict[str, Any]:
    state = training_state(save / "iter_0000006")
    assert state is not None
    found: dict[str, Any] = state["domains"]
    return found


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", WHOLE)
def test_another_layout_draws_the_same_samples(runs: Path, name: str) -> None:
    """Also one that continues another's run, in the middle between two updates or after several."""
    whole = runs / RUNS[name][3]
    found, wanted = _state(runs / name), _state(whole)
    assert {key: found[key] for key in EXACT} == {key: wanted[key] for key in EXACT}
    assert found["weights"] == pytest.approx(wanted["weights"], abs=1e-5)
    assert len({round(weight, 3) for weight in found["weights"].values()}) == 3
    steps = losses(runs / name)
    alone = {n: x for n, x in losses(whole).items() if n in steps}
    assert steps == pytest.approx(alone, abs=1e-4)
    for iteration, table in tables(runs / name).items():
        for domain, row in table.items():
            assert row == pytest.approx(tables(whole)[iteration][domain], abs=1e-4)


@pytest.mark.parametrize("name", [name for name in JUDGED if name != "judged-alone"])
def test_every_layout_judges_alike(runs: Path, name: str) -> None:
    """Also where the last step of 4 windows is filled up with some that do not count."""
    found, wanted = (
        json.loads((runs / f"{n}.json").read_text())["domains"] for n in (name, "judged-alone")
    )
    assert any(row["windows"] % 4 for row in wanted.values()), "no step is filled up"
    for domain, row in wanted.items():
        assert found[domain] == pytest.approx(row, abs=1e-6)
