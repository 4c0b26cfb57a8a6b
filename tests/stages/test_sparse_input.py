"""What is said of a sparse model's zeros and pattern where other weights are made of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from megatron_prune.planning.plan import Kept, PrunePlan, load_plan
from megatron_prune.sources.sparsity_record import load_sparsity
from megatron_prune.stages.sparse_input import zeros_left
from megatron_prune.store import open_source
from tests.pico import TEXT, ok, tensors
from tests.sparse import make_sparse

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def sparse(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "hf"
    make_sparse(models("gqa"), path)
    return path


def holds(x: torch.Tensor) -> bool:
    """2:4, by a loop over rows and groups."""
    return all(
        sum(value == 0 for value in row[at : at + 4]) >= 2
        for row in x.tolist()
        for at in range(0, len(row), 4)
    )


def said(done: object) -> str:
    return next(line for line in done.err.splitlines() if "is sparse (wanda, 2:4)" in line)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--drop-layers", 1), "the zeros of what is kept stay as they are, and so does the "
         "pattern"),
        (("--num-attention-heads-remain", 3), "about 50.0% of zeros are expected to stay in its "
         "matrices, and the pattern holds, since whole groups of inputs are kept"),
        (("--ffn-hidden-size-remain", 60), "it is lost in 4 of 28 matrices (mlp.linear_fc2)"),
        (("--ffn-hidden-size-remain", 60, "--hidden-size-remain", 36, "--drop-layers", 0),
         "it is lost in 18 of 21 matrices (self_attention.linear_"),
    ],
)  # fmt: skip
def test_prune_says_what_stays_and_is_right(
    flags: tuple, says: str, sparse: Path, tmp_path: Path
) -> None:
    done = ok("prune", "--load", sparse, "--save", tmp_path / "p", "--to", "hf", *flags)
    line = said(done)
    assert says in line and "train --keep-zeros keeps what is zero" in line
    assert not (tmp_path / "p/sparsity.json").exists()
    record = json.loads((sparse / "sparsity.json").read_text())["tensors"]
    matrices = [x for name, x in tensors(tmp_path / "p").items() if "_proj." in name]
    broken = sum(not holds(x) for x in matrices)
    told = line.partition("lost in ")[2].partition(" ")[0]
    assert broken == int(told or 0) and len(matrices) in (len(record), len(record) - 7)
    share = sum(int((x == 0).sum()) for x in matrices) / sum(x.numel() for x in matrices)
    assert abs(share - 0.5) < 0.01


def test_the_share_is_that_of_the_matrices_that_stay(models: Models, tmp_path: Path) -> None:
    record = make_sparse(models("gqa"), tmp_path / "s", wanted=lambda name: "layers.0." in name)
    ok("plan", "--load", tmp_path / "s", "--save", tmp_path / "p.json",
       "--ffn-hidden-size-remain", 60, "--drop-layers", 0)  # fmt: skip
    left = zeros_left(record, load_plan(tmp_path / "p.json"))
    assert (left.share, left.patterned, left.broken) == (0.0, (), ())


@pytest.mark.parametrize(
    ("kept", "is_broken"),
    [
        (range(8, 16), False),
        ((0, 1, 2, 3, 20, 21, 22, 23), False),
        ((0, 1, 2, 4, 20, 21, 22, 23), True),  # begins where a group does, and has a gap
        (range(2, 10), True),
        (range(6), True),
    ],
)
def test_a_pattern_holds_where_whole_groups_of_inputs_are_kept(
    kept: Sequence[int], is_broken: bool, sparse: Path
) -> None:
    source = open_source(sparse)
    plan = PrunePlan(
        source=source.config.shape, kept=Kept(ffn=dict.fromkeys(range(4), tuple(kept))),
        source_digest=source.digest, criterion="random", seed=1, prune_type="unbalance",
        balance_for=1,
    )  # fmt: skip
    left = zeros_left(load_sparsity(sparse / "sparsity.json"), plan)
    assert len(left.patterned) == 28 and len(left.broken) == 4 * is_broken


def test_vocabulary_alone_leaves_the_pattern_whole(sparse: Path, tmp_path: Path) -> None:
    ok("vocab", "plan", "--tokenizer", sparse, "--vocab-size-remain", 300, "--any-size",
       "--save", tmp_path / "v.json")  # fmt: skip
    done = ok("vocab", "prune", "--load", sparse, "--plan", tmp_path / "v.json",
              "--save", tmp_path / "p", "--to", "hf")  # fmt: skip
    assert "stay as they are, and so does the pattern" in said(done)
    assert not (tmp_path / "p/sparsity.json").exists()
    assert (tmp_path / "p/vocab_plan.json").exists()


def test_repair_and_rotation_have_no_zeros(sparse: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT * 20)
    text = ("--data", tmp_path / "t.txt", "--num-samples", 2, "--seq-length", 32)
    cut = ("--ffn-hidden-size-remain", 60, "--repair", "--dry-run")
    done = ok("prune", "--load", sparse, "--save", tmp_path / "p", "--to", "hf", *cut, *text)
    assert "matrices that --repair computes anew have no zeros" in said(done)
    turn = ("--rotate", *text)
    done = ok("convert", "--load", sparse, "--save", tmp_path / "r", "--to", "hf", *turn)
    assert "so the zeros are gone and sparsity.json stays behind" in said(done)
    assert not (tmp_path / "r/sparsity.json").exists()
    assert all(int((x == 0).sum()) < 9 for x in tensors(tmp_path / "r").values())


def test_a_dense_model_and_a_damaged_record(models: Models, sparse: Path, tmp_path: Path) -> None:
    given = ("--save", tmp_path / "p", "--to", "hf", "--drop-layers", 1, "--overwrite")
    assert "sparse" not in ok("prune", "--load", models("gqa"), *given).err
    ok("convert", "--load", sparse, "--save", tmp_path / "s", "--to", "hf")
    (tmp_path / "s/manifest.json").unlink()
    path = tmp_path / "s/sparsity.json"
    path.write_text(path.read_text().replace('"reached": 0.5', '"reached": 5'))
    err = ok("prune", "--load", tmp_path / "s", *given).err
    assert "warning: " in err and "what becomes of its zeros is not known" in err
