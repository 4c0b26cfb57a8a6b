"""Qwen's first generation is read as the Qwen2 that computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.pico import IDS, assert_same, directory_bytes, ok, refused, tensors
from tests.qwen1 import make_qwen1

TP = "--tensor-model-parallel-size"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("qwen1")
    return make_qwen1(root / "qwen", root / "twin", 379, 1), root / "twin"


def test_it_becomes_shards_and_a_qwen2(models: tuple[Path, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, twin = models
    before = directory_bytes(model)
    ok("convert", "--load", model, "--save", tmp_path / "tp3", "--to", "megatron", TP, 3)
    ok("convert", "--load", tmp_path / "tp3", "--save", tmp_path / "hf", "--to", "hf")
    assert_same(tensors(tmp_path / "hf"), tensors(twin))
    found, wanted = (AutoModelForCausalLM.from_pretrained(p) for p in (tmp_path / "hf", twin))
    assert torch.equal(found(IDS).logits, wanted(IDS).logits)
    assert found.config.max_position_embeddings == 128 and not hasattr(found.config, "auto_map")
    assert directory_bytes(model) == before


def test_it_is_pruned_as_its_twin(models: tuple[Path, Path], tmp_path: Path) -> None:
    sizes = ("--hidden-size-remain", 36, "--ffn-hidden-size-remain", 48)
    for model in models:
        plan, save = tmp_path / f"{model.name}.json", tmp_path / model.name
        ok("plan", "--load", model, "--seed", 3, *sizes, "--save", plan)
        ok("prune", "--load", model, "--plan", plan, "--save", save, "--to", "hf")
        ok("verify", "--load", save, "--source", model, "--plan", plan)
    assert_same(tensors(tmp_path / "qwen"), tensors(tmp_path / "twin"))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"no_bias": False}, "no_bias is False; wanted True"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5; wanted 1.0"),
        ({"intermediate_size": 96}, "config.json says (48, 48)"),
    ],
)
def test_what_qwen2_cannot_say_is_refused(
    models: tuple[Path, Path], tmp_path: Path, values: dict[str, object], says: str
) -> None:
    for file in models[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | values
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused("inspect", tmp_path, says=says, code=(2, 3))
