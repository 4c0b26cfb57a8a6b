"""``shear`` without noise on process groups: the same masks at every layout, resumed to the bit.

One launch of four processes runs all commands; what they left is looked at here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.store import open_source
from tests.engine.lora_runs import optimizer_keys, stored
from tests.engine.method_runs import CUT, DETERMINISTIC, FROZEN, PROJECTED, SELF, state, words
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, rows, told, weights
from tests.launch import made_once

TP2 = ("--tensor-model-parallel-size", 2)
TP3 = ("--tensor-model-parallel-size", 3)
PP2 = ("--pipeline-model-parallel-size", 2)
CP2 = ("--context-parallel-size", 2)
SP = ("--sequence-parallel", "--seq-length", 33)
SPLIT = ("--use-distributed-optimizer",)
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", 1)  # fmt: skip
HALF = ("--exit-interval", 2)
QUICK = (
    *("--train-iters", 4, "--global-batch-size", 4, "--save-interval", 4, "--eval-interval", 2),
    *("--distributed-timeout-minutes", 1, "--prune-type", "unbalance"),
)
HIDDEN = (*CUT, "--hidden-size-remain", 40)
TIED = (*HIDDEN[2:4], *HIDDEN[4:], "--ffn-hidden-size-remain", 72, "--num-attention-heads-remain",
        4)  # fmt: skip
DET = (*HIDDEN, *DETERMINISTIC)
TAUGHT = (*DET, *FROZEN, *SELF)
PROJ = (*HIDDEN, *PROJECTED, "--mask-lr", 0.1)
# name -> model, ranks, flags, the run of one process that it equals
RUNS: dict[str, tuple[str, int, tuple[object, ...], str]] = {
    "det": ("gqa", 1, DET, "det"),
    "det-pp2-dp2-split": ("gqa", 4, (*DET, *PP2, *SPLIT), "det"),
    "proj": ("gqa", 1, PROJ, "proj"),
    "proj-tp3": ("gqa", 3, (*PROJ, *TP3), "proj"),
    "taught": ("gqa", 1, TAUGHT, "taught"),
    "taught-tp3": ("gqa", 3, (*TAUGHT, *TP3), "taught"),
    "taught-pp2": ("gqa", 2, (*TAUGHT, *PP2), "taught"),
    "taught-cp2": ("gqa", 2, (*TAUGHT, *CP2), "taught"),
    "taught-33": ("gqa", 1, (*TAUGHT, "--seq-length", 33), "taught-33"),
    "taught-tp3-sp": ("gqa", 3, (*TAUGHT, *TP3, *SP), "taught-33"),
    "narrow": ("gqa", 1, (*CUT, *DETERMINISTIC, *FROZEN), "narrow"),
    "narrow-pp2-full": ("gqa", 2, (*CUT, *DETERMINISTIC, *FROZEN, *PP2, *FULL), "narrow"),
    "tied": ("qwen_tied", 1, (*TIED, *DETERMINISTIC, *FROZEN, *SELF), "tied"),
    "tied-tp2-pp2": ("qwen_tied", 4, (*TIED, *DETERMINISTIC, *FROZEN, *SELF, *TP2, *PP2), "tied"),
    "bf16-tp3-sp": ("gqa", 3, (*TAUGHT, *TP3, *SP, "--bf16"), "taught-33"),
}  # fmt: skip
WHOLE = [name for name, run in RUNS.items() if run[3] != name and "bf16" not in name]
FIXED = [name for name, run in RUNS.items() if FROZEN[0] in run[2] and "bf16" not in name]
AGAIN = ("taught-pp2",)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, reference: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "shear-methods-on-ranks") as (folder, fresh):
        if fresh:
            jobs = _jobs(folder, reference, corpus)
            codes = dict(zip([name for name, _ in jobs], launch([j for _, j in jobs], folder)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _jobs(folder: Path, reference: Path, corpus: Path) -> list[tuple[str, Job]]:
    def job(name: str, save: str, *more: object) -> tuple[str, Job]:
        kind, ranks, flags, _ = RUNS[name]
        tokenizer = ("--tokenizer-model", reference / "gqa")  # the corpus is of this one
        every = (*tokenizer, *QUICK, *flags, *more)
        given: dict[str, Any] = {"words": words(reference / kind, folder / save, corpus, *every)}
        return save, Job(check="command", world=ranks, given=given)

    jobs = [job(name, name) for name in RUNS]
    for name in AGAIN:
        save, half = job(name, f"again-{name}", *HALF)
        jobs += [(f"{save}-half", half), job(name, f"again-{name}")]
    return jobs


def _all(save: Path, name: str) -> list[float]:
    return [row[name] for row in rows(save) if name in row]


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", WHOLE)
def test_every_layout_learns_the_same_masks(runs: Path, name: str) -> None:
    alone, found = runs / RUNS[name][3], runs / name
    assert losses(found) == pytest.approx(losses(alone), abs=1e-4)
    for kind in ("kl loss", "validation loss", "grad-norm"):
        assert _all(found, kind) == pytest.approx(_all(alone, kind), rel=1e-3)
    ours, theirs = state(found, 4), state(alone, 4)
    for key in ("parameters", "lambdas"):
        assert torch.allclose(ours[key], theirs[key], rtol=0, atol=2e-3), key
    assert (found / "plan.json").read_bytes() == (alone / "plan.json").read_bytes()


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run[3] == name])
def test_something_is_learned(runs: Path, name: str) -> None:
    """A control: masks move, and more than what layouts may differ by."""
    still = state(runs / name, 4)["adam"]["parameters"]["exp_avg"]
    assert float(still.abs().max()) > 0
    last = {other: losses(runs / other)[4] for other in ("det", "proj", "taught", "narrow")}
    values = list(last.values())
    assert min(abs(a - b) for i, a in enumerate(values) for b in values[:i]) > 1e-3


def test_in_bf16_it_learns_alike_within_its_rounding(runs: Path) -> None:
    assert losses(runs / "bf16-tp3-sp") == pytest.approx(losses(runs / "taught-33"), abs=3e-2)


@pytest.mark.parametrize("name", FIXED)
def test_frozen_weights_are_those_of_the_source_on_ranks(
    runs: Path, reference: Path, name: str
) -> None:
    source, found = open_source(reference / RUNS[name][0]), weights(runs / name)
    assert all(torch.equal(found[key], source.read(key)) for key in found)
    assert optimizer_keys(runs / name, 4) == set()


@pytest.mark.parametrize("name", AGAIN)
def test_resume_is_bitwise_on_ranks(runs: Path, name: str) -> None:
    again, whole = runs / f"again-{name}", runs / name
    assert told(again) == told(whole)
    ours, theirs = state(again, 4), state(whole, 4)
    for which in ("parameters", "lambdas"):
        assert torch.equal(ours[which], theirs[which])
    ours_w, theirs_w = stored(again, 4), stored(whole, 4)
    assert all(torch.equal(ours_w[key], theirs_w[key]) for key in theirs_w)
