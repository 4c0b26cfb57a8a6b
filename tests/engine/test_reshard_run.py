"""``reshard`` of a training run: it goes on from what is written, or it is said that it cannot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from megatron_prune.store.commit import check_manifest
from tests.engine.runs import losses, weights, words
from tests.launch import made_once
from tests.pico import ok, run

HALF = ("--exit-interval", 3)
KINDS = {
    "fp32": (),
    "split": ("--use-distributed-optimizer",),
    "bf16": ("--bf16",),
    "bf16-split": ("--bf16", "--use-distributed-optimizer"),
}
TP3_PP2 = ("--tensor-model-parallel-size", 3, "--pipeline-model-parallel-size", 2)
DROPPED = "its optimizer's state, its schedule and its iteration are dropped"
ANEW = "its weights begin a new run at step 1"


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory, reference: Path, corpus: Path) -> Path:
    """Runs of three of six steps, by the name in `KINDS`, and ``lora``."""
    with made_once(tmp_path_factory, "halves") as (folder, fresh):
        if fresh:
            for name, flags in {**KINDS, "lora": ("--lora-rank", 2)}.items():
                ok(*words(reference / "gqa", folder / name, corpus, *HALF, *flags))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_resharded_run_goes_on_as_the_run_itself(
    kind: str, halves: Path, corpus: Path, tmp_path: Path
) -> None:
    before, after = halves / kind, tmp_path / "resharded"
    done = ok("reshard", "--load", before, "--save", after, *TP3_PP2)
    assert "the optimizer's state of iteration 3" in done.out and DROPPED not in done.err
    assert check_manifest(after / "iter_0000003") == []
    for load in (before, after):
        ok(*words(load, tmp_path / f"on-{load.name}", corpus, *KINDS[kind]))
    ours, theirs = tmp_path / f"on-{before.name}", tmp_path / "on-resharded"
    assert list(losses(theirs)) == [4, 5, 6] and losses(theirs) == losses(ours)
    wanted, found = weights(ours), weights(theirs)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_resharded_run_goes_on_where_it_lies(halves: Path, corpus: Path, tmp_path: Path) -> None:
    """Resharded there and back, its files are other ones; it is the run of the same steps."""
    ok("reshard", "--load", halves / "bf16", "--save", tmp_path / "there", *TP3_PP2)
    ok("reshard", "--load", tmp_path / "there", "--save", tmp_path / "back")
    ok(*words("/nowhere", tmp_path / "back", corpus, "--bf16"))
    ok(*words(halves / "bf16", tmp_path / "on", corpus, "--bf16"))
    assert losses(tmp_path / "back") == losses(tmp_path / "on")


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("fp32", ("--no-optim",)), ("fp32", ("--ckpt-format", "torch")), ("lora", ())],
)
def test_what_is_dropped_is_said_now_and_at_the_next_start(
    kind: str, flags: tuple[str, ...], halves: Path, corpus: Path, tmp_path: Path
) -> None:
    done = ok("reshard", "--load", halves / kind, "--save", tmp_path / "out", *flags)
    assert DROPPED in done.err and (tmp_path / "out/iter_0000001").is_dir()
    done = ok(*words(tmp_path / "out", tmp_path / "run", corpus, *HALF))
    assert ANEW in done.err and list(losses(tmp_path / "run")) == [1, 2, 3]


def test_convert_says_what_it_drops(halves: Path, tmp_path: Path) -> None:
    for to in ("megatron", "hf"):
        done = ok("convert", "--load", halves / "fp32", "--save", tmp_path / to, "--to", to)
        assert DROPPED in done.err


def test_a_new_run_is_told_of_only_where_one_could_expect_another(
    halves: Path, reference: Path, corpus: Path, tmp_path: Path
) -> None:
    for number, (load, flags) in enumerate(
        [(reference / "gqa", ()), (halves / "fp32", ("--finetune",)), (halves / "fp32", ())]
    ):
        done = ok(*words(load, tmp_path / str(number), corpus, *HALF, *flags))
        assert ANEW not in done.err


def test_a_state_of_unknown_classes_is_not_written_again(halves: Path, tmp_path: Path) -> None:
    load = Path(shutil.copytree(halves / "fp32", tmp_path / "run"))
    (common,) = load.glob("iter_*/common.pt")
    state = torch.load(common, weights_only=False)
    state["optimizer"]["path"] = Path("/x")
    torch.save(state, common)
    (common.parent / "manifest.json").unlink()
    done = run("reshard", "--load", load, "--save", tmp_path / "out")
    assert done.code == 3 and "no state of a run needs" in done.err
    assert not (tmp_path / "out").exists()
    ok("reshard", "--load", load, "--save", tmp_path / "out", "--no-optim")
