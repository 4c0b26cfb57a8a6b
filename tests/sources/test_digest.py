"""The fingerprint of a model: the same in every format and layout, another for another model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_prune.sources.digest import source_digest
from megatron_prune.store import open_source
from tests import pico


def digest(path: Path) -> str:
    source = open_source(path)
    try:
        return source_digest(source)
    finally:
        source.close()


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("tied", [("torch_dist", 3, 1), ("torch_dist", 1, 2), ("torch", 3, 2), ("torch", 1, 4)]),
        ("qwen_tied", [("torch_dist", 4, 1), ("torch", 2, 2)]),
        ("bf16", [("torch_dist", 3, 2), ("torch", 1, 1)]),
    ],
)
def test_the_digest_is_the_same_in_every_format_and_layout(
    kind: str, layouts: list[tuple], models: Callable[[str], Path], shards: Callable[..., Path]
) -> None:
    assert {digest(shards(kind, *layout)) for layout in layouts} == {digest(models(kind))}


def test_two_models_of_one_shape_differ(models: Callable[[str], Path]) -> None:
    assert digest(models("gqa")) != digest(models("twin"))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_one_tensor_of_another_model_is_noticed(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(models("gqa"), tmp_path / "m")
    tensors = pico.tensors(tmp_path / "m")
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert digest(tmp_path / "m") != digest(models("gqa"))


def test_the_same_tensors_with_other_heads_differ(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """12 heads of 4 channels have the tensors of 6 heads of 8."""
    shutil.copytree(models("gqa"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps(values | {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4})
    )
    assert torch.equal(
        *(pico.tensors(p)["lm_head.weight"] for p in (models("gqa"), tmp_path / "m"))
    )
    assert digest(tmp_path / "m") != digest(models("gqa"))
