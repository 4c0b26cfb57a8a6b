"""``train --lora-rank`` on process groups: the same run at every layout, resumed at any other.

One launch of four processes runs all commands; what they left is looked at here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.lora_runs import factors, make_sparse, stored
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import losses, rows, told, weights, words
from tests.launch import made_once
from tests.pico import make_model

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
    *("--distributed-timeout-minutes", 1, "--lora-rank", 4, "--lr", "1e-2"),
)
SOME = ("--lora-targets", "linear_proj", "linear_fc1", "--lora-alpha", 16, "--lora-keep-zeros")
# name -> kind or run to load, ranks, flags, the run of one process that it equals
RUNS: dict[str, tuple[str, int, tuple[object, ...], str]] = {
    "alone": ("gqa", 1, (), "alone"),
    "tp3": ("gqa", 3, TP3, "alone"),
    "pp2": ("gqa", 2, PP2, "alone"),
    "cp2": ("gqa", 2, CP2, "alone"),
    "pp2-full": ("gqa", 2, (*PP2, *FULL), "alone"),
    "dp2-split": ("gqa", 2, SPLIT, "alone"),
    "pp2-dp2-split": ("gqa", 4, (*PP2, *SPLIT), "alone"),
    "alone-33": ("gqa", 1, ("--seq-length", 33), "alone-33"),
    "tp3-sp": ("gqa", 3, (*TP3, *SP), "alone-33"),
    "some": ("sparse", 1, SOME, "some"),
    "some-tp3": ("sparse", 3, (*TP3, *SOME), "some"),
    "four": ("qwen_tied", 1, (), "four"),
    "four-tp2-pp2": ("qwen_tied", 4, (*TP2, *PP2), "four"),
    "qwen3": ("qwen3_tied", 1, (), "qwen3"),
    "qwen3-tp2": ("qwen3_tied", 2, TP2, "qwen3"),
    "taught": ("gqa", 1, ("--teacher", "{twin}"), "taught"),
    "taught-tp3": ("gqa", 3, (*TP3, "--teacher", "{twin}"), "taught"),
    "half": ("gqa", 1, HALF, "alone"),
    "half-tp3": ("gqa", 3, (*TP3, *HALF), "alone"),
    "half-dp2-split": ("gqa", 2, (*SPLIT, *HALF), "alone"),
    "tp3-from-alone": ("half", 3, TP3, "alone"),
    "pp2-from-tp3": ("half-tp3", 2, PP2, "alone"),
    "tp3-split-from-dp2-split": ("half-dp2-split", 3, (*TP3, *SPLIT), "alone"),
    "bf16-tp3-sp": ("gqa", 3, (*TP3, *SP, "--bf16"), "alone-33"),
}
FROM = {name: run[0] for name, run in RUNS.items() if run[0] in RUNS}
WHOLE = [name for name, run in RUNS.items() if run[3] != name and HALF[0] not in run[2]]
AGAIN = ("tp3-sp", "pp2-dp2-split", "some-tp3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path, reference: Path) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "lora-on-ranks") as (folder, fresh):
        if fresh:
            make_model(folder / "twin", "twin")
            make_sparse(folder / "sparse")
            jobs = _jobs(folder, reference, corpus)
            codes = dict(zip([name for name, _ in jobs], launch([j for _, j in jobs], folder)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _jobs(folder: Path, reference: Path, corpus: Path) -> list[tuple[str, Job]]:
    def job(name: str, save: str, *more: object) -> tuple[str, Job]:
        load, ranks, flags, _ = RUNS[name]
        own = load in RUNS or load == "sparse"
        start = folder / load if own else reference / load
        tokenizer = ("--tokenizer-model", reference / "gqa")  # the corpus is of this one
        every = [str(flag).format(twin=folder / "twin") for flag in (*QUICK, *flags, *more)]
        given: dict[str, Any] = {"words": words(start, folder / save, corpus, *tokenizer, *every)}
        return save, Job(check="command", world=ranks, given=given)

    jobs = [job(name, name) for name in RUNS]
    for name in AGAIN:
        save, half = job(name, f"again-{name}", *HALF)
        jobs += [(f"{save}-half", half), job(name, f"again-{name}")]
    return jobs


def _all(save: Path, name: str) -> list[float]:
    return [row[name] for row in rows(save) if name in row]


def _moved(save: Path) -> torch.Tensor:
    """All of B, which begins at zero."""
    found = factors(stored(save, 4))
    return torch.cat([x.flatten().float() for k, x in found.items() if k.endswith("lora_B")])


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", [n for n in WHOLE if "bf16" not in n])
def test_every_layout_trains_alike(runs: Path, name: str) -> None:
    alone, found = runs / RUNS[name][3], runs / name
    begin = 2 if name in FROM else 0
    wanted = {n: x for n, x in losses(alone).items() if n > begin}
    assert losses(found) == pytest.approx(wanted, abs=1e-4)
    for kind in ("kl loss", "validation loss", "grad-norm"):
        ours, theirs = _all(found, kind), _all(alone, kind)
        assert ours == pytest.approx(theirs[-len(ours) :] if ours else theirs, rel=1e-3)
    ours, theirs = (factors(stored(run, 4)) for run in (found, alone))
    assert set(ours) == set(theirs)
    assert _moved(alone).abs().mean() > 1e-3, "nothing was learned"
    assert all((ours[key] - theirs[key]).abs().max() < 1e-3 for key in theirs)
    whole, same = weights(alone), weights(found)
    assert all((whole[key] - same[key]).abs().max() < 1e-3 for key in whole)


def test_in_bf16_it_trains_alike_within_its_rounding(runs: Path) -> None:
    assert losses(runs / "bf16-tp3-sp") == pytest.approx(losses(runs / "alone-33"), abs=3e-2)


def test_settings_make_other_runs(runs: Path) -> None:
    """A control: what the layouts are compared in tells runs apart."""
    last = [losses(runs / name)[4] for name in ("alone", "alone-33", "some", "four", "taught")]
    assert min(abs(a - b) for i, a in enumerate(last) for b in last[:i]) > 1e-3


@pytest.mark.parametrize("name", AGAIN)
def test_resume_is_bitwise_on_ranks(runs: Path, name: str) -> None:
    again, whole = runs / f"again-{name}", runs / name
    assert told(again) == told(whole)
    ours, theirs = stored(again, 4), stored(whole, 4)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["tp3", "tp3-sp", "pp2-dp2-split", "some-tp3", "four-tp2-pp2"])
def test_the_model_itself_is_not_changed_on_ranks(runs: Path, name: str) -> None:
    """Bit for bit that of one process, which `test_lora_command` holds to the source."""
    ours, theirs = stored(runs / name, 4), stored(runs / RUNS[name][3], 4)
    base = [key for key in theirs if key.startswith("decoder.") and "lora_" not in key]
    assert len(base) >= 7
    assert all(torch.equal(ours[key], theirs[key]) for key in base)


def test_zeros_stay_zeros_on_ranks(runs: Path) -> None:
    from megatron_prune.store import open_source

    before, after = open_source(runs / "sparse"), weights(runs / "some-tp3")
    for part in ("self_attention.linear_proj", "mlp.linear_gate", "mlp.linear_up"):
        name = f"decoder.layers.1.{part}.weight"
        assert torch.equal(after[name] == 0, before.read(name) == 0)
        assert not torch.equal(after[name], before.read(name))
