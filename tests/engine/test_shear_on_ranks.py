"""``shear`` on process groups: the same masks at every layout, resumed at any other.

One launch of four processes runs all commands; what they left is looked at here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.planning.plan import load_plan
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, rows, told, weights
from tests.engine.shear_runs import GQA_CUT, masks, words
from tests.launch import made_once
from tests.pico import VOCAB, make_model

TP2 = ("--tensor-model-parallel-size", 2)
TP3 = ("--tensor-model-parallel-size", 3)
PP2 = ("--pipeline-model-parallel-size", 2)
UNEVEN = (*PP2, "--decoder-first-pipeline-num-layers", 1)
CP2 = ("--context-parallel-size", 2)
SP = ("--sequence-parallel", "--seq-length", 33)
SPLIT = ("--use-distributed-optimizer",)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", 1)  # fmt: skip
HALF = ("--exit-interval", 2)
QUICK = ("--train-iters", 4, "--save-interval", 2, "--distributed-timeout-minutes", 1)
GROUPS = ("--num-attention-heads-remain", 4, "--num-query-groups-remain", 2)
SIZE = ("--target-params", 90000, "--mask-units", "both")
ONE = ("--micro-batch-size", 1)  # four microbatches in a pipeline
# name -> kind or run to load, ranks, flags, the run of one process that it equals
RUNS: dict[str, tuple[str, int, tuple[object, ...], str]] = {
    "alone": ("gqa", 1, GQA_CUT, "alone"),
    "tp3": ("gqa", 3, (*GQA_CUT, *TP3), "alone"),
    "pp2": ("gqa", 2, (*GQA_CUT, *UNEVEN), "alone"),
    "cp2": ("gqa", 2, (*GQA_CUT, *CP2), "alone"),
    "dp2": ("gqa", 2, GQA_CUT, "alone"),
    "pp2-dp2-split": ("gqa", 4, (*GQA_CUT, *PP2, *SPLIT), "alone"),
    "one": ("gqa", 1, (*GQA_CUT, *ONE), "one"),
    "one-pp2-full": ("gqa", 2, (*GQA_CUT, *ONE, *PP2, *FULL), "one"),
    "alone-33": ("gqa", 1, (*GQA_CUT, "--seq-length", 33), "alone-33"),
    "tp3-sp": ("gqa", 3, (*GQA_CUT, *TP3, *SP), "alone-33"),
    "groups": ("gqa", 1, GROUPS, "groups"),
    "groups-pp2": ("gqa", 2, (*GROUPS, *PP2), "groups"),
    "mha": ("of-mha", 1, ("--num-attention-heads-remain", 4), "mha"),
    "mha-tp2": ("of-mha", 2, ("--num-attention-heads-remain", 4, *TP2), "mha"),
    "size": ("qwen_tied", 1, SIZE, "size"),
    "size-tp2-pp2": ("qwen_tied", 4, (*SIZE, *TP2, *PP2), "size"),
    "half-tp3": ("gqa", 3, (*GQA_CUT, *TP3, *HALF), "alone"),
    "pp2-from-tp3": ("half-tp3", 2, (*GQA_CUT, *PP2), "alone"),
    "fp16": ("gqa", 1, (*GQA_CUT, "--fp16", "--initial-loss-scale", 1024), "alone"),
    "bf16-tp3-sp": ("gqa", 3, (*GQA_CUT, *TP3, *SP, "--bf16"), "alone-33"),
}
FROM = {name: run[0] for name, run in RUNS.items() if run[0] in RUNS}
WHOLE = [
    name for name, run in RUNS.items()
    if run[3] != name and HALF[0] not in run[2] and "16" not in name
]  # fmt: skip
AGAIN = ("pp2-dp2-split",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, reference: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "shear-on-ranks") as (folder, fresh):
        if fresh:
            make_model(folder / "of-mha", "mha", vocab_size=VOCAB)
            jobs = _jobs(folder, reference, corpus)
            codes = dict(zip([name for name, _ in jobs], launch([j for _, j in jobs], folder)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _jobs(folder: Path, reference: Path, corpus: Path) -> list[tuple[str, Job]]:
    def job(name: str, save: str, *more: object) -> tuple[str, Job]:
        load, ranks, flags, _ = RUNS[name]
        tokenizer = ("--tokenizer-model", reference / "gqa")  # the corpus is of this one
        start = folder / load if load == "of-mha" else reference / ("gqa" if load in RUNS else load)
        every = (*QUICK, *tokenizer, *flags, *more)
        given: dict[str, Any] = {"words": words(start, folder / save, corpus, *every)}
        return save, Job(check="command", world=ranks, given=given)

    jobs = []
    for name in RUNS:
        if name in FROM:  # goes on in a directory of its own
            jobs.append((f"{name}-copy", _copy(folder / FROM[name], folder / name)))
        jobs.append(job(name, name))
    for name in AGAIN:
        save, half = job(name, f"again-{name}", *HALF)
        jobs += [(f"{save}-half", half), job(name, f"again-{name}")]
    return jobs


def _copy(run: Path, to: Path) -> Job:
    return Job(check="copied", world=1, given={"run": str(run), "to": str(to)})


def _close(name: str, found: torch.Tensor, wanted: torch.Tensor, within: float) -> None:
    assert found.shape == wanted.shape
    far = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
    assert far < within, (name, far)


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", WHOLE)
def test_masks_are_the_same_at_every_layout(runs: Path, name: str) -> None:
    alone, found = runs / RUNS[name][3], runs / name
    assert losses(found) == pytest.approx(losses(alone), abs=1e-4)
    theirs, ours = masks(alone), masks(found)
    assert theirs["parameters"].std() > 1e-3, "nothing was learned"
    for which in ("parameters", "lambdas"):
        _close(which, ours[which], theirs[which], 1e-4)
        # the gradients themselves, which Adam's steps hide
        _close(f"gradient of {which}", ours["adam"][which]["exp_avg"],
               theirs["adam"][which]["exp_avg"], 2e-4)  # fmt: skip
    for ours_row, theirs_row in zip(told(found), told(alone), strict=True):
        assert ours_row.keys() == theirs_row.keys()
        for key, value in theirs_row.items():
            if key.startswith(("expected", "target", "lambda", "validation", "grad")):
                assert ours_row[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
    whole, same = weights(alone), weights(found)
    assert all((whole[key] - same[key]).abs().max() < 1e-3 for key in whole)


@pytest.mark.parametrize("name", WHOLE)
def test_plans_are_the_same_but_for_a_unit_on_the_edge(runs: Path, name: str) -> None:
    ours, theirs = (load_plan(run / "plan.json") for run in (runs / name, runs / RUNS[name][3]))
    assert ours.target == theirs.target and ours.source_digest == theirs.source_digest
    kept = [json.loads(plan.to_json())["kept"] for plan in (ours, theirs)]
    moved = 0
    for axis, units in kept[1].items():
        pairs = [(kept[0][axis], units)] if not isinstance(units, dict) else [
            (kept[0][axis].get(layer, []), found) for layer, found in units.items()
        ]  # fmt: skip
        moved += sum(len(set(b) - set(a)) for a, b in pairs if b is not None)
    assert moved <= 1


def test_with_16_bits_masks_are_learned_alike_within_rounding(runs: Path) -> None:
    for name, within in (("fp16", 3e-2), ("bf16-tp3-sp", 1e-1)):
        assert losses(runs / name) == pytest.approx(losses(runs / RUNS[name][3]), abs=3e-2)
        ours, theirs = masks(runs / name), masks(runs / RUNS[name][3])
        assert ours["parameters"].dtype == torch.float32
        _close(name, ours["adam"]["lambdas"]["exp_avg"], theirs["adam"]["lambdas"]["exp_avg"], 1e-2)
        first, second = (
            ours["adam"]["parameters"]["exp_avg"],
            theirs["adam"]["parameters"]["exp_avg"],
        )
        assert float((first - second).norm() / second.norm()) < within, name


def test_settings_make_other_runs(runs: Path) -> None:
    """A control: what the layouts are compared in tells runs apart."""
    last = [
        losses(runs / name)[4] for name in ("alone", "one", "alone-33", "groups", "mha", "size")
    ]
    assert min(abs(a - b) for i, a in enumerate(last) for b in last[:i]) > 1e-4
    ours, theirs = (
        masks(runs / name)["adam"]["parameters"]["exp_avg"] for name in ("alone", "one")
    )
    assert float((ours - theirs).norm() / theirs.norm()) > 1e-2


@pytest.mark.parametrize("name", AGAIN)
def test_resume_is_bitwise_on_ranks(runs: Path, name: str) -> None:
    again, whole = runs / f"again-{name}", runs / name
    assert told(again) == told(whole)
    ours, theirs = masks(again), masks(whole)
    for which in ("parameters", "lambdas"):
        assert torch.equal(ours[which], theirs[which])
        for key, x in theirs["adam"][which].items():
            assert torch.equal(ours["adam"][which][key], x)
    assert (again / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()


def test_masks_are_told_once_a_logged_iteration(runs: Path) -> None:
    found = [row for row in rows(runs / "tp3") if "lm loss" in row]
    assert len(found) == 4
    by_layer = found[-1]["share gone by layer"]
    assert {word: len(x) for word, x in by_layer.items()} == {"heads": 4, "ffn": 4, "layers": 4}
