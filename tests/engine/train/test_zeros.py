"""``train --keep-zeros``: what is zero stays zero, at every layout, and all else is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_prune.store import open_source
from tests.engine.lora_runs import stored
from tests.engine.on_ranks import Job, launch
from tests.engine.runs import batches, losses, rows, told, weights, words
from tests.launch import made_once
from tests.pico import assert_same, make_model, ok, refused, tensors

KEEP = ("--keep-zeros",)
SPLIT = ("--use-distributed-optimizer",)
TP2 = ("--tensor-model-parallel-size", 2)
PP2 = ("--pipeline-model-parallel-size", 2)
CP2 = ("--context-parallel-size", 2)
SP = ("--sequence-parallel",)
STEPS = 20
Train = Callable[..., Path]


def _linears(values: dict[str, Tensor]) -> list[str]:
    """Those in the layers, by Hugging Face's or canonical names."""
    return [name for name, x in values.items() if ".layers." in name and x.ndim == 2]


def make_two_of_four(folder: Path, kind: str) -> Path:
    """A model whose linears keep the two largest of every four weights of a row."""
    make_model(folder, kind)
    values = load_file(folder / "model.safetensors")
    for name in _linears(values):
        x_four = values[name].view(-1, 4)
        x_four.scatter_(1, x_four.abs().argsort(dim=1)[:, :2], 0)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gqa and qwen_tied, 2:4."""
    with made_once(tmp_path_factory, "two-of-four") as (folder, fresh):
        if fresh:
            make_two_of_four(folder / "gqa", "gqa")
            make_two_of_four(folder / "qwen_tied", "qwen_tied")
    return folder


@pytest.fixture
def train(tmp_path: Path, sparse: Path, corpus: Path) -> Train:
    """``train(save, *flags, load=...)`` runs and succeeds; returns the directory."""

    def once(save: str, *flags: object, load: object = None) -> Path:
        ok(*words(load or sparse / "gqa", tmp_path / save, corpus, *flags))
        return tmp_path / save

    return once


def _start(path: Path) -> dict[str, Tensor]:
    source = open_source(path)
    return {name: source.read(name).clone() for name in weights(path)}


def _revived(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, int]:
    """Matrix -> weights that were zero and are not."""
    assert len(_linears(before)) == 4 * 7
    return {name: int((after[name][before[name] == 0] != 0).sum()) for name in _linears(before)}


# ---- one process ---------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--bf16",), ("--fp16", *SPLIT)], ids=str)
def test_zeros_hold_in_weights_and_moments_after_every_step(
    train: Train, more: tuple[str, ...]
) -> None:
    every = ("--save-interval", 1, "--train-iters", 4, "--eval-iters", 0, "--lr-warmup-iters", 1)
    save = train("run", *KEEP, *every, *more, "--initial-loss-scale", 64, "--weight-decay", 0.5)
    first = {key: x for key, x in stored(save, 1).items() if x.ndim == 3}  # that step's rate is 0
    assert len(first) == 4  # of all layers each
    for iteration in (2, 3, 4):
        found = stored(save, iteration) | _optimizer_state(save, iteration)
        for key, x in first.items():
            zero = x == 0
            assert 0.49 < zero.float().mean() < 0.51
            held = [name for name in found if name.endswith(key)]  # masters, moments, the weight
            assert len(held) == (4 if more else 3)
            assert not any(found[name][zero].any() for name in held), (iteration, key)
            assert (found[key] != x)[~zero].float().mean() > 0.7, key


def _optimizer_state(save: Path, iteration: int) -> dict[str, Tensor]:
    """``exp_avg.decoder...`` -> tensor, by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load

    path = save / f"iter_{iteration:07d}"
    listed = FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in listed.items()
        if key.startswith("optimizer.state.") and hasattr(entry, "size")
    }
    load(state, checkpoint_id=path, no_dist=True)
    return {key.removeprefix("optimizer.state."): x for key, x in state.items()}


def test_steps_are_those_of_a_plain_torch_loop(train: Train, sparse: Path, corpus: Path) -> None:
    """Transformers' model, gradients and weights masked by hand: losses, norms, weights."""
    from transformers import AutoModelForCausalLM

    save = train("run", *KEEP, "--weight-decay", 0.5, "--clip-grad", 0.2)
    model = AutoModelForCausalLM.from_pretrained(sparse / "gqa", dtype=torch.float32)
    named = dict(model.named_parameters())
    zero = {name: named[name] == 0 for name in _linears(named)}
    decayed = [x for x in named.values() if x.ndim == 2]
    groups = [{"params": decayed}, {"params": [x for x in named.values() if x.ndim == 1]}]
    groups[1]["weight_decay"] = 0.0
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    for row, batch in zip([r for r in rows(save) if "lm loss" in r], batches(save, corpus)):
        for group in adam.param_groups:
            group["lr"] = row["learning-rate"]
        targets = batch[:, 1:].contiguous()
        loss = model(batch[:, :-1].contiguous(), labels=targets, shift_labels=targets).loss
        loss.backward()
        for name, where in zero.items():
            named[name].grad[where] = 0
        norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.2)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            for name, where in zero.items():
                named[name][where] = 0
        assert row["lm loss"] == pytest.approx(float(loss), abs=1e-4)
        assert row["grad-norm"] == pytest.approx(float(norm), rel=1e-3)
    ok("convert", "--load", save, "--save", save / "../hf", "--to", "hf")
    found = tensors(save / "../hf")
    assert set(zero) == set(_linears(found))
    assert all((found[name] - named[name]).abs().max() < 1e-3 for name in found)


@pytest.mark.parametrize("more", [(), ("--bf16", *SPLIT)], ids=str)
def test_a_weight_that_lands_on_zero_stays_there_resumed_or_not(
    train: Train, tmp_path: Path, more: tuple[str, ...]
) -> None:
    """Adam's first step is lr to the last bits, and some weights here are of that size."""
    load, rate = make_two_of_four(tmp_path / "start", "gqa"), 2.0**-10
    values = load_file(load / "model.safetensors")
    for name in _linears(values):
        values[name].sign_().mul_(rate)
    save_file(values, load / "model.safetensors", metadata={"format": "pt"})
    flags = (*KEEP, *more, "--lr", rate, "--lr-decay-style", "constant", "--lr-warmup-iters", 0,
             "--weight-decay", 0, "--adam-eps", 1e-30, "--train-iters", 3)  # fmt: skip
    whole = train("whole", *flags, load=load)
    begin = train("again", *flags, "--exit-interval", 1, load=load)
    first, after = _start(load), weights(begin)
    landed = {n: (first[n] != 0) & (after[n] == 0) for n in _linears(first)}
    assert sum(int(x.sum()) for x in landed.values()) > 1000
    again = train("again", *flags, load=load)
    assert told(again) == told(whole)
    assert_same(stored(again, 3), stored(whole, 3))
    assert_same(_optimizer_state(again, 3), _optimizer_state(whole, 3))
    end = weights(whole)
    assert sum(_revived(first, end).values()) == 0
    assert not any(end[name][where].any() for name, where in landed.items())
    assert any(end[name].any() for name in landed)


@pytest.mark.parametrize(
    ("is_sparse", "says"),
    [
        (
            True,
            "--keep-zeros: 41,472 of the 82,944 weights of the layers' matrices (50.00%) are zero",
        ),
        (
            False,
            "--keep-zeros: 3 of the 82,944 weights of the layers' matrices (0.00%) are zero and",
        ),
    ],
)
def test_it_says_how_many_are_kept(
    tmp_path: Path, sparse: Path, corpus: Path, is_sparse: bool, says: str
) -> None:
    load = sparse / "gqa"
    if not is_sparse:
        load = make_model(tmp_path / "nearly", "gqa")
        values = load_file(load / "model.safetensors")
        values["model.layers.3.mlp.down_proj.weight"][5, 4:7] = 0
        save_file(values, load / "model.safetensors", metadata={"format": "pt"})
    done = ok(*words(load, tmp_path / "run", corpus, *KEEP, "--train-iters", 3))
    assert says in done.err
    assert ("a dense model can have as many by chance" in done.err) != is_sparse


def test_a_run_that_kept_zeros_is_not_continued_without(
    tmp_path: Path, sparse: Path, corpus: Path
) -> None:
    command = words(sparse / "gqa", tmp_path / "run", corpus)
    ok(*command, *KEEP, "--exit-interval", 3)
    refused(*command, says="iter_0000003: was saved with --keep-zeros, which is missing; give it")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "gqa is dense, 0 of the 82,944 weights of its layers' matrices are zero; start from"),
        (("--dry-run",), "gqa is dense, 0 of the 82,944 weights"),
        (("--init-random",), "--keep-zeros and --init-random: weights that are drawn have no zero"),
        (("--lora-rank", 4), "--keep-zeros and --lora-rank: the weights are fixed, and factors"),
        (("--lora-rank", 4, "--lora-keep-zeros"), "give --lora-keep-zeros instead"),
    ],
    ids=str,
)
def test_what_has_no_zeros_to_keep_is_refused(
    tmp_path: Path, reference: Path, corpus: Path, flags: tuple[object, ...], says: str
) -> None:
    refused(*words(reference / "gqa", tmp_path / "run", corpus, *KEEP, *flags), says=says)
    assert not (tmp_path / "run").exists()


# ---- on ranks ------------------------------------------------------------------------------------

LONG = (
    *("--train-iters", STEPS, "--micro-batch-size", 1, "--global-batch-size", 2),
    *("--save-interval", STEPS, "--eval-interval", STEPS, "--distributed-timeout-minutes", 1),
)
HALF = ("--exit-interval", 10)
TAUGHT = ("--bf16", "--teacher", "{reference}/gqa")
# name -> kind, ranks, flags, the run of one process that it equals
RUNS: dict[str, tuple[str, int, tuple[object, ...], str]] = {
    "alone": ("gqa", 1, KEEP, "alone"),
    "free": ("gqa", 1, (), "free"),
    "cp2": ("gqa", 2, (*CP2, *KEEP), "alone"),
    "pp2-dp2-split": ("gqa", 4, (*PP2, *SPLIT, *KEEP), "alone"),
    "four": ("qwen_tied", 1, KEEP, "four"),
    "four-tp2-sp": ("qwen_tied", 2, (*TP2, *SP, *KEEP), "four"),
    "taught": ("gqa", 1, (*TAUGHT, *KEEP), "taught"),
    "taught-dp2-split": ("gqa", 2, (*TAUGHT, *SPLIT, *KEEP), "taught"),
}
AGAIN = ("taught-dp2-split",)
KEPT = [name for name in RUNS if "free" not in name]


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, reference: Path, sparse: Path, corpus: Path
) -> Path:
    """The directory of every run, under its name; ``codes.pt`` has the exit codes."""
    with made_once(tmp_path_factory, "zeros-on-ranks") as (folder, fresh):
        if fresh:
            jobs = {}
            for name in RUNS:
                jobs[name] = _job(name, folder / name, reference, sparse, corpus)
            for name in AGAIN:
                where = folder / f"again-{name}"
                jobs[f"{name}-half"] = _job(name, where, reference, sparse, corpus, *HALF)
                jobs[f"{name}-again"] = _job(name, where, reference, sparse, corpus)
            codes = dict(zip(jobs, launch(list(jobs.values()), folder)))
            torch.save(codes, folder / "codes.pt")
    return folder


def _job(name: str, save: Path, reference: Path, sparse: Path, corpus: Path, *more: object) -> Job:
    kind, ranks, flags, _ = RUNS[name]
    every = [str(flag).format(reference=reference) for flag in (*LONG, *flags, *more)]
    tokenizer = ("--tokenizer-model", reference / "gqa")  # the corpus is of this one
    given = {"words": words(sparse / kind, save, corpus, *tokenizer, *every)}
    return Job(check="command", world=ranks, given=given)


def test_every_command_ends_well(runs: Path) -> None:
    codes = torch.load(runs / "codes.pt")
    assert {name: found for name, found in codes.items() if set(found) != {0}} == {}


@pytest.mark.parametrize("name", KEPT)
def test_zeros_stay_and_the_others_move_at_every_layout(
    runs: Path, sparse: Path, name: str
) -> None:
    before, after = _start(sparse / RUNS[name][0]), weights(runs / name)
    assert set(_revived(before, after).values()) == {0}
    for matrix in _linears(before):
        kept = before[matrix] != 0
        assert kept.float().mean() == 0.5
        assert (after[matrix] != before[matrix])[kept].float().mean() > 0.9, matrix


def test_without_the_flag_zeros_move(runs: Path, sparse: Path) -> None:
    """A control: the check of the zeros sees those that move."""
    found = _revived(_start(sparse / "gqa"), weights(runs / "free"))
    assert min(found.values()) > 100


@pytest.mark.parametrize("name", [name for name in KEPT if RUNS[name][3] != name])
def test_every_layout_trains_alike(runs: Path, name: str) -> None:
    far = 3e-2 if "taught" in name else 1e-4
    alone, found = runs / RUNS[name][3], runs / name
    assert len(losses(alone)) == STEPS
    assert losses(found) == pytest.approx(losses(alone), abs=far)
    for kind in ("kl loss", "validation loss", "grad-norm"):
        ours, theirs = ([r[kind] for r in rows(run) if kind in r] for run in (found, alone))
        assert ours == pytest.approx(theirs, rel=10 * far)
    learned = [
        r["kl loss" if "taught" in name else "lm loss"] for r in rows(alone) if "lm loss" in r
    ]
    assert learned[-1] < learned[0] - 0.02


@pytest.mark.parametrize("name", AGAIN)
def test_resume_is_bitwise(runs: Path, name: str) -> None:
    again, whole = runs / f"again-{name}", runs / name
    assert told(again) == told(whole)
    assert_same(stored(again, STEPS), stored(whole, STEPS))
    assert_same(_optimizer_state(again, STEPS), _optimizer_state(whole, STEPS))
