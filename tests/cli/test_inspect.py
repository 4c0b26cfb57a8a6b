"""`inspect` tells the truth about every format, and its JSON parses whatever else is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.store import megatron
from tests.pico import KINDS, VOCAB, ok, refused, stock_copy, tensors
from tests.sparse import make_sparse

Models, Shards = Callable[[str], Path], Callable[..., Path]
SHAPE = {
    "num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96, "num_attention_heads": 6,
    "num_query_groups": 3, "kv_channels": 8, "vocab_size": VOCAB,
}  # fmt: skip


def inspect(path: Path) -> dict:
    return json.loads(ok("inspect", path, "--json").out)


@pytest.mark.parametrize(
    ("kind", "layout", "padded"),
    [
        ("tied", None, VOCAB),
        ("gqa", ("torch_dist", 3, 1), 384),
        ("tied", ("torch_dist", 1, 2), 384),
        ("qwen", ("torch", 3, 2), 384),
        ("bf16", ("torch_dist", 3, 2), 384),
    ],
)
def test_inspect_tells_the_truth(
    kind: str, layout: tuple | None, padded: int, models: Models, shards: Shards
) -> None:
    found = inspect(shards(kind, *layout) if layout else models(kind))
    assert found["shape"] == SHAPE and found["padded_vocab_size"] == padded
    assert found["format"] == (layout[0] if layout else "hf")
    assert found["family"] == KINDS[kind][0]
    assert found["tied"] is (kind == "tied")
    tp, pp = layout[1:] if layout else (1, 1)
    assert found["tensor_model_parallel_size"] == tp
    assert found["pipeline_model_parallel_size"] == pp
    assert found["dtype"] == ("bf16" if kind == "bf16" else "fp32")
    assert found["parameters"] == sum(x.numel() for x in tensors(models(kind)).values())
    assert found["iteration"] == (1 if layout else 0)
    assert found.get("make_vocab_size_divisible_by") == (None if layout else 128)


def test_a_sparse_model_tells_its_record(models: Models, tmp_path: Path) -> None:
    make_sparse(models("gqa"), tmp_path / "s")
    ok("convert", "--load", tmp_path / "s", "--save", tmp_path / "m", "--to", "megatron")
    told = {
        "sparsity_method": "wanda", "sparsity_pattern": "2:4", "sparsity_asked": 0.5,
        "sparsity_reached": 0.5, "sparse_matrices": 28,
    }  # fmt: skip
    for path in (tmp_path / "s", tmp_path / "m"):
        found = inspect(path)
        assert {name: found[name] for name in told} == told
    assert "sparsity_reached              0.5" in ok("inspect", tmp_path / "s").out.splitlines()
    assert not [name for name in inspect(models("gqa")) if "spars" in name]


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_the_padded_vocabulary_is_what_is_stored_and_not_what_we_would_pad_to(
    ckpt_format: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "padded_vocab_size", lambda vocab_size, tensor_parallel: 402)
    layout = ("--tensor-model-parallel-size", 3, "--ckpt-format", ckpt_format)
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "m", "--to", "megatron", *layout)
    found = inspect(tmp_path / "m")
    assert found["padded_vocab_size"] == 402 and found["shape"]["vocab_size"] == VOCAB


def test_the_json_parses_when_there_are_warnings(shards: Shards, tmp_path: Path) -> None:
    done = ok("inspect", stock_copy(shards("gqa"), tmp_path / "s"), "--json")
    assert json.loads(done.out)["shape"] == SHAPE
    assert "warning: " in done.err and "nothing can be verified" in done.err


def test_family_names_what_a_stock_checkpoint_does_not_tell(shards: Shards, tmp_path: Path) -> None:
    stock = stock_copy(shards("gqa"), tmp_path / "s")
    assert inspect(stock)["family"] == "llama"
    told = ok("inspect", stock, "--json", "--family", "mistral")
    assert json.loads(told.out)["family"] == "mistral"


def test_the_iteration_directory_itself_can_be_named(shards: Shards) -> None:
    assert inspect(shards("gqa") / "iter_0000001")["iteration"] == 1


def test_without_json_it_prints_one_fact_a_line(models: Models) -> None:
    lines = ok("inspect", models("gqa")).out.splitlines()
    assert "hidden_size                   48" in lines
    assert any(line.startswith("parameters") and "," in line for line in lines)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text("x"), "is a file; wanted a checkpoint directory"),
        (lambda p: p.mkdir(), "no config.json, no .metadata and no mp_rank_"),
        (lambda p: (p.mkdir(), (p / "config.json").write_text("{}")), "no weights to read"),
    ],
)
def test_what_is_no_checkpoint_is_refused(
    make: Callable[[Path], object], says: str, tmp_path: Path
) -> None:
    make(tmp_path / "x")
    assert str(tmp_path / "x") in refused("inspect", tmp_path / "x", says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "''; wanted an iteration number or 'release'"),
        ("latest", "'latest'; wanted an iteration number"),
        ("\u00b2", "wanted an iteration number"),
        ("9" * 5000, "wanted an iteration number"),
        ("-1", "'-1'; wanted an iteration number"),
        ("7", "points to iter_0000007, which is not there"),
        ("release", "points to release, which is not there"),
    ],
)
def test_a_tracker_that_points_nowhere_is_refused(
    content: str, says: str, shards: Shards, tmp_path: Path
) -> None:
    shutil.copytree(shards("gqa"), tmp_path / "m")
    (tmp_path / "m/latest_checkpointed_iteration.txt").write_text(content)
    refused("inspect", tmp_path / "m", says=says)


def test_release_is_a_name_of_an_iteration_too(shards: Shards, tmp_path: Path) -> None:
    shutil.copytree(shards("gqa"), tmp_path / "m")
    (tmp_path / "m/iter_0000001").rename(tmp_path / "m/release")
    (tmp_path / "m/latest_checkpointed_iteration.txt").write_text("release\n")
    assert inspect(tmp_path / "m")["shape"] == SHAPE
