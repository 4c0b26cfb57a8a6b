"""Weights that are NaN or infinite are refused by whoever writes or decides, and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.sources.finite import is_finite, nonfinite_text
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import CastSource
from megatron_prune.store import open_source
from tests.pico import ok, refused, run
from tests.sources.test_source import without_layer

Models = Callable[[str], Path]
NAME = "model.layers.2.mlp.down_proj.weight"
WRITES = {
    "convert": ("convert", "--to", "megatron", "--tensor-model-parallel-size", 3),
    "rounds": ("plan", "--ffn-hidden-size-remain", 48, "--rounds", 2, "--criterion", "magnitude"),
    "plan": ("plan", "--ffn-hidden-size-remain", 48),
    "prune": ("prune", "--to", "hf", "--ffn-hidden-size-remain", 48),
    "score": ("score", "--criterion", "magnitude"),
}


def broken(source: Path, out: Path, *values: float, name: str = NAME) -> Path:
    """A copy whose tensor begins with ``values``."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name].view(-1)[: len(values)] = torch.tensor(values).to(tensors[name].dtype)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("at", (0, 41, 98))
def test_one_value_anywhere_is_seen(dtype: torch.dtype, value: float, at: int) -> None:
    x = torch.randn(9, 11).to(dtype)
    assert is_finite(x) and is_finite(x[:0]) and is_finite(torch.full((3,), 6e4, dtype=dtype))
    x.view(-1)[at] = value
    assert not is_finite(x) and not is_finite(x.T) and not is_finite(x[:, at % 11 :])


@pytest.mark.parametrize("stage", WRITES)
def test_a_source_that_is_not_finite_is_refused_and_leaves_nothing(
    models: Models, tmp_path: Path, stage: str
) -> None:
    source = broken(models("gqa"), tmp_path / "hf", float("nan"), float("inf"), float("-inf"))
    found = run(WRITES[stage][0], "--load", source, "--save", tmp_path / "out", *WRITES[stage][1:])
    assert found.code == 3, found
    assert f"{source}: {NAME}: 3 of 4608 values are not finite (1 NaN, 2 infinite)" in found.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("stage", ("convert", "plan", "prune"))
def test_what_is_allowed_goes_through_and_is_told(
    models: Models, tmp_path: Path, stage: str
) -> None:
    source = broken(models("gqa"), tmp_path / "hf", float("nan"))
    flags = ("--load", source, "--save", tmp_path / "out", "--allow-nonfinite")
    found = ok(WRITES[stage][0], *flags, *WRITES[stage][1:])
    assert f"warning: {source}: {NAME}: 1 of 4608 values are not finite" in found.err


def test_reshard_looks_too(models: Models, tmp_path: Path) -> None:
    source = broken(models("gqa"), tmp_path / "hf", float("nan"))
    megatron = ("--load", source, "--save", tmp_path / "m", "--to", "megatron")
    ok("convert", *megatron, "--allow-nonfinite")
    flags = ("reshard", "--load", tmp_path / "m", "--save", tmp_path / "out")
    refused(*flags, says="decoder.layers.2.mlp.linear_fc2.weight: 1 of 4608", code=3)
    ok(*flags, "--allow-nonfinite")


def test_a_cast_that_is_too_narrow_is_refused(models: Models, tmp_path: Path) -> None:
    source = broken(models("gqa"), tmp_path / "hf", 7e4, -1e30)
    flags = ("convert", "--load", source, "--to", "hf", "--save", tmp_path / "out")
    says = "finite in torch.float32; made into torch.float16, 2 of 4608 values are not finite"
    refused(*flags, "--dtype", "fp16", says=f"{NAME}: {says} (0 NaN, 2 infinite)", code=3)
    ok(*flags, "--dtype", "bf16")


def test_a_wrapped_source_names_the_tensor_of_the_file(models: Models, tmp_path: Path) -> None:
    source = open_source(broken(models("gqa"), tmp_path / "hf", float("nan")))
    pruned = CastSource(PrunedSource(source, without_layer(source, 0)), "fp16")
    text = nonfinite_text(pruned, "decoder.layers.1.mlp.linear_fc2.weight")
    assert text.startswith(f"{tmp_path / 'hf'}: {NAME}: 1 of 4608")


def test_scores_name_the_tensor_of_the_file(models: Models, tmp_path: Path) -> None:
    """A fused parameter of the running model has several of the file's."""
    name = "model.layers.3.self_attn.k_proj.weight"
    source = broken(models("gqa"), tmp_path / "hf", float("inf"), name=name)
    (tmp_path / "t.txt").write_text("word " * 400)
    refused(
        *("score", "--load", source, "--criterion", "activation", "--seq-length", 16),
        *("--data", tmp_path / "t.txt", "--num-samples", 2, "--save", tmp_path / "s.safetensors"),
        says=f"{source}: {name}: 1 of 1152 values are not finite",
        code=3,
    )


@pytest.mark.parametrize("flags", ([], ["--dry-run"]))
def test_prune_looks_at_what_it_drops(models: Models, tmp_path: Path, flags: list[str]) -> None:
    name = "model.layers.1.self_attn.v_proj.weight"
    source = broken(models("gqa"), tmp_path / "hf", float("nan"), name=name)
    cut = ("prune", "--to", "hf", "--drop-layers", "1", "--load", source, *flags)
    refused(*cut, "--save", tmp_path / "out", says=f"{name}: 1 of 1152", code=3)
    if not flags:
        found = ok(*cut, "--save", tmp_path / "out", "--allow-nonfinite")
        assert found.err.count(f"warning: {source}: {name}: 1 of 1152") == 1
