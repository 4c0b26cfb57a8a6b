"""config.json -> facts -> config.json: every spelling is read, what we do not interpret is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.families import read_config
from megatron_prune.families.config import hf_config
from megatron_prune.model.shape import ModelConfig
from tests.pico import KINDS, LLAMA3

SIZES = {
    "num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 3, "vocab_size": 379,
}  # fmt: skip


def config(tmp_path: Path, model_type: str = "llama", **values: Any) -> ModelConfig:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **SIZES, **values}))
    return read_config(path)


def test_swish_is_silu(tmp_path: Path) -> None:
    found = config(tmp_path, hidden_act="swish")
    assert hf_config(found)["hidden_act"] == "swish"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_what_transformers_wrote_comes_back_and_head_dim_is_always_there(
    kind: str, models: Callable[[str], Path]
) -> None:
    before = json.loads((models(kind) / "config.json").read_text())
    after = hf_config(read_config(models(kind) / "config.json"))
    derived = before["hidden_size"] // before["num_attention_heads"]
    assert after.pop("head_dim") == before.pop("head_dim", derived)
    assert after == before


@pytest.mark.parametrize(
    ("values", "base", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),  # noqa: E501
        (
            {"rope_parameters": LLAMA3},
            1e4,
            {key: value for key, value in LLAMA3.items() if key != "rope_theta"},
        ),
    ],
)  # fmt: skip
def test_every_spelling_of_rope_is_read(
    values: dict, base: float, scaling: dict | None, tmp_path: Path
) -> None:
    found = config(tmp_path, **values)
    assert (found.rotary_base, found.rope_scaling) == (base, scaling)


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ({}, "fp32"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({"torch_dtype": "float16"}, "fp16"),
        ({"torch_dtype": "torch.bfloat16"}, "bf16"),
    ],
)
def test_both_spellings_of_dtype_are_read_and_kept(
    values: dict, dtype: str, tmp_path: Path
) -> None:
    found = config(tmp_path, **values)
    assert found.dtype == dtype
    written = hf_config(replace(found, dtype="fp16"))
    assert written[next(iter(values), "dtype")] == "float16"


def test_what_a_config_leaves_out_is_what_transformers_assumes(tmp_path: Path) -> None:
    plain = config(tmp_path)
    assert (plain.shape.kv_channels, plain.norm_epsilon, plain.tied) == (8, 1e-6, False)
    assert (plain.qkv_bias, plain.proj_bias, plain.mlp_bias) == (False, False, False)
    assert config(tmp_path, num_key_value_heads=None).shape.num_query_groups == 6
    assert config(tmp_path, "mistral").sliding_window == 4096
    assert config(tmp_path, "mistral", sliding_window=None).sliding_window is None
    assert config(tmp_path, "qwen2", sliding_window=64).sliding_window is None
    assert config(tmp_path, "qwen2").qkv_bias


def test_keys_that_are_not_ours_are_kept(tmp_path: Path) -> None:
    written = hf_config(config(tmp_path, pretraining_tp=2, my_key={"a": [1]}, eos_token_id=[1, 2]))
    assert written["my_key"] == {"a": [1]} and written["eos_token_id"] == [1, 2]


def test_lists_of_a_value_a_layer_lose_the_dropped_layers(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"] * 2
    values = {"layer_types": kinds, "use_sliding_window": True}
    written = hf_config(config(tmp_path, "qwen2", **values), [0, 2, 3])
    assert written["layer_types"] == [kinds[0], kinds[2], kinds[3]]


def test_a_model_without_a_config_gets_one_that_says_the_same(tmp_path: Path) -> None:
    """As a stock Megatron checkpoint has none."""
    for values in ({}, {"rope_parameters": LLAMA3}, {"rope_theta": 5e5, "rms_norm_eps": 1e-5}):
        before = replace(config(tmp_path, **values), hf_config={})
        path = tmp_path / "config.json"
        path.write_text(json.dumps(hf_config(before)))
        assert replace(read_config(path), hf_config={}) == before
