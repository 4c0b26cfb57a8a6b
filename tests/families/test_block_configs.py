"""Widths of layers in config.json: said as readers of Nemotron-NAS models take them, and read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import CheckpointError
from megatron_prune.families import FAMILIES, read_config
from megatron_prune.families.block_configs import block_configs, read_block_configs
from megatron_prune.families.config import hf_config
from megatron_prune.model.shape import ModelShape

SHAPE = ModelShape(
    num_layers=3,
    hidden_size=48,
    ffn_hidden_size=512,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=379,
    ffn_per_layer=(256, 512, 512),
)


def as_engines_read(ffn_mult: float, n_embd: int) -> int:
    """The formula that vLLM, SGLang, TensorRT-LLM, llama.cpp and mlx-lm have in common."""
    size = int(2 * ffn_mult * n_embd / 3)
    return size if size % 256 == 0 else size + 256 - size % 256


@pytest.mark.parametrize("hidden", [31, 576, 1000, 3072, 4096, 5120, 8192, 16384])
def test_every_multiple_of_256_comes_back_exactly_rounded_to_six_decimals_or_not(
    hidden: int,
) -> None:
    widths = tuple(range(256, 65536 + 1, 256))
    shape = replace(
        SHAPE, hidden_size=hidden, num_layers=len(widths), ffn_hidden_size=65536,
        ffn_per_layer=widths,
    )  # fmt: skip
    mults = [block["ffn"]["ffn_mult"] for block in block_configs(shape)]
    assert all(isinstance(mult, float) for mult in mults)  # llama.cpp insists
    assert tuple(as_engines_read(mult, hidden) for mult in mults) == widths
    assert tuple(as_engines_read(round(mult, 6), hidden) for mult in mults) == widths  # mlx-lm


def test_one_width_that_is_no_multiple_of_256_makes_all_of_them_plain_numbers() -> None:
    blocks = block_configs(replace(SHAPE, ffn_per_layer=(255, 512, 512)))
    assert [block["ffn"]["intermediate_size"] for block in blocks] == [255, 512, 512]
    assert not any("ffn_mult" in block["ffn"] for block in blocks)  # vLLM would go by it


def config(widths: tuple[int, ...] | None = (256, 512, 512)) -> dict[str, Any]:
    shape = replace(SHAPE, ffn_per_layer=widths, ffn_hidden_size=max(widths or (512,)))
    values = {
        "num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 512, "vocab_size": 379,
        "num_attention_heads": 6, "head_dim": 8, "model_type": "nemotron-nas",
    }  # fmt: skip
    return {**values, "block_configs": block_configs(shape)}


@pytest.mark.parametrize("widths", [(256, 512, 512), (255, 40, 41)])
def test_what_was_written_is_read_back(widths: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(widths)))
    found = read_config(tmp_path / "config.json")
    assert found.shape == replace(SHAPE, ffn_per_layer=widths, ffn_hidden_size=max(widths))
    again = hf_config(found)
    assert again["block_configs"] == config(widths)["block_configs"]
    assert again["architectures"] == ["DeciLMForCausalLM"]


def test_equal_widths_are_a_plain_llama(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config(None)))
    found = read_config(tmp_path / "config.json")
    assert found.shape == replace(SHAPE, ffn_per_layer=None) and found.family.name == "llama"
    assert hf_config(found)["model_type"] == "llama"
    assert "block_configs" not in hf_config(found)


def test_only_llama_is_written_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config()))
    for family in ("mistral", "qwen2"):
        with pytest.raises(CheckpointError, match=f"family {family}: .* only in family llama"):
            hf_config(replace(read_config(tmp_path / "config.json"), family=FAMILIES[family]))


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("attention", {"no_op": True}, r"block_configs\[1\].attention has no_op True"),
        ("attention", {"window_length": 64}, "has window_length 64"),
        ("attention", {"n_heads_in_group": 3}, r"layers have \[2, 3\] heads in a group, of 6"),
        ("ffn", {"replace_with_linear": True}, r"block_configs\[1\].ffn has replace_with_linear"),
        ("ffn", {"hidden_act": "gelu"}, "gelu; wanted silu"),
        ("ffn", {"ffn_mult": None}, "ffn_mult None and intermediate_size None say no width"),
        ("ffn", {"intermediate_size": 511}, "intermediate_size 511 say no width, or two"),
        ("ffn", {"ffn_mult": "x"}, "TypeError"),
    ],
)
def test_layers_of_another_kind_are_refused(
    part: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    values = config()
    values["block_configs"][1][part].update(changes)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path / "config.json")


def test_too_few_layers_are_refused() -> None:
    values = config()
    values["block_configs"].pop()
    with pytest.raises(CheckpointError, match="has 2 layers, num_hidden_layers says 3"):
        read_block_configs(values)
