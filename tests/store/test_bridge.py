"""Megatron-Bridge's checkpoints, written as its checkpointing.py does, from real bytes of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prune.errors import CheckpointError
from megatron_prune.store import open_source
from megatron_prune.store.megatron_args import STOCK_ROPE_SCALING
from tests.pico import assert_same, ok, refused, tensors

Models, Shards = Callable[[str], Path], Callable[..., Path]
PROVIDERS = {
    "llama": "megatron.bridge.models.llama.llama_provider.Llama31ModelProvider8B",
    "qwen2": "megatron.bridge.models.qwen.qwen_provider.Qwen25ModelProvider500M",
    "qwen3": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "mistral": "megatron.bridge.models.mistral.mistral_provider.MistralModelProvider",
}


def plain(value: Any) -> Any:
    """A field as Megatron's yaml_utils represent it."""
    if isinstance(value, torch.dtype):
        return {"_target_": str(value), "_call_": False}
    if isinstance(value, Enum):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"_target_": kind, "_call_": True, "_args_": [value.value], "_name_": value.name}
    if isinstance(value, partial):
        name = f"{value.func.__module__}.{value.func.__qualname__}"
        return {"_target_": name, "_partial_": True, "_args_": list(value.args), **value.keywords}
    if callable(value):
        return {"_target_": f"{value.__module__}.{value.__qualname__}", "_call_": False}
    return list(value) if isinstance(value, tuple) else value


def run_config(model: Path, *, nested: bool = False, **changes: Any) -> dict[str, Any]:
    """What ``cfg.to_yaml`` leaves of a model: every field, those of its provider with them."""
    hf = json.loads((model / "config.json").read_text())
    heads, window = hf["num_attention_heads"], hf.get("sliding_window")
    kind = hf["model_type"]
    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"],
        num_attention_heads=heads, num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        ffn_hidden_size=hf["intermediate_size"], normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False,
        add_qkv_bias=kind == "qwen2", qk_layernorm=kind == "qwen3",
        layernorm_epsilon=hf["rms_norm_eps"], hidden_dropout=0.0, attention_dropout=0.0,
        window_size=[window - 1, 0] if kind == "mistral" else None, bf16=True,
        params_dtype=torch.bfloat16,
    )  # fmt: skip
    inner = {f.name: plain(getattr(config, f.name)) for f in fields(config) if f.name[0] != "_"}
    outer = {
        "_target_": PROVIDERS[kind], "vocab_size": hf["vocab_size"], "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 128, "seq_length": hf["max_position_embeddings"],
        "share_embeddings_and_output_weights": hf["tie_word_embeddings"], "parallel_output": True,
        "position_embedding_type": "rope", "rotary_percent": 1.0, "rope_scaling": False,
        "rope_scaling_factor": 1.0, "rotary_base": hf["rope_parameters"]["rope_theta"],
        "seq_len_interpolation_factor": None, "scatter_embedding_sequence_parallel": True,
        "hf_model_id": "org/model", "fp16_lm_cross_entropy": False,
        "transformer_layer_spec": {
            "_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False
        },
    }  # fmt: skip
    if nested:
        outer["_target_"] = "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig"
        model_values = {**outer, "transformer": {"_target_": "x.BridgeTransformerConfig", **inner}}
    else:
        model_values = {**inner, **outer}
    return {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {**model_values, **changes},
        "checkpoint": {"_target_": "x.CheckpointConfig", "save": "/x", "ckpt_format": "torch_dist"},
        "peft": None,
    }


def as_bridge(root: Path, run: dict[str, Any], path: Path) -> Path:
    """A torch_dist root of ours as Megatron-Bridge leaves one: its bytes, its other files."""
    shutil.copytree(root, path)
    step = path / "iter_0000001"
    (step / "hf").rename(step / "tokenizer")
    (step / "tokenizer" / "config.json").unlink()
    (step / "manifest.json").unlink()
    common = torch.load(step / "common.pt", weights_only=False)
    del common["args"]
    torch.save({**common, "content_metadata": {"distrib_optim": None}}, step / "common.pt")
    torch.save({"step": torch.tensor(1)}, step / "train_state.pt")
    shutil.copy(step / "train_state.pt", path / "latest_train_state.pt")
    (step / "run_config.yaml").write_text(yaml.safe_dump(run))
    return path


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen", "qwen3", "mistral", "bf16"])
def test_the_same_model_comes_back(
    kind: str, nested: bool, models: Models, shards: Shards, tmp_path: Path
) -> None:
    run = run_config(models(kind), nested=nested)
    path = as_bridge(shards(kind, "torch_dist", 3, 1), run, tmp_path / "b")
    done = ok("convert", "--load", path, "--save", tmp_path / "hf", "--to", "hf")
    assert "nobody here knows" not in done.err
    assert_same(tensors(tmp_path / "hf"), tensors(models(kind)))
    found = json.loads((tmp_path / "hf/config.json").read_text())
    wanted = json.loads((models(kind) / "config.json").read_text())
    facts = (
        "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "dtype",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_parameters",
        "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    assert {key: found[key] for key in facts} == {key: wanted[key] for key in facts}
    assert found.get("sliding_window") == (64 if kind == "mistral" else None)
    assert (tmp_path / "hf/tokenizer.json").is_file()


def test_scaled_rope_is_as_bridge_passes_it_on(
    models: Models, shards: Shards, tmp_path: Path
) -> None:
    root, made = shards("gqa", "torch_dist", 3, 1), models("gqa")
    for number, (changes, wanted) in enumerate(
        (
            ({"rope_scaling": True, "rope_scaling_factor": 32.0},
             {**STOCK_ROPE_SCALING, "factor": 32.0}),
            ({"seq_len_interpolation_factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        )
    ):  # fmt: skip
        path = as_bridge(root, run_config(made, **changes), tmp_path / str(number))
        assert open_source(path).config.rope_scaling == wanted


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_target_": "megatron.bridge.models.mamba.MambaModelProvider"}, "MambaModelProvider"),
        ({"_target_": "megatron.bridge.models.llama.Llama4ModelProvider"}, "Llama4ModelProvider"),
        ({"_target_": "os.system"}, "model is a system"),
        ({"_target_": 5}, "model is a 5"),
        ({"num_moe_experts": 8}, "num_moe_experts is 8"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type is 'yarn'"),
        ({"activation_func": {"_target_": "torch.nn.functional.gelu"}}, "only SwiGLU"),
        ({"transformer_layer_spec": {"_target_": "mine.spec"}}, "'mine.spec'"),
        ({"restore_modelopt_state": True}, "restore_modelopt_state"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"rotary_base": [1]}, "its arguments: TypeError"),
        ({"rope_scaling": True, "rope_scaling_factor": "x"}, "rope factor 'x'"),
        ({"num_layers": "4"}, "num_layers"),
    ],
)
def test_other_models_are_refused_by_name(
    changes: dict[str, Any], says: str, models: Models, shards: Shards, tmp_path: Path
) -> None:
    run = run_config(models("gqa"), **changes)
    path = as_bridge(shards("gqa", "torch_dist", 3, 1), run, tmp_path / "b")
    refused("inspect", path, says=says)


@pytest.mark.parametrize(
    "text", ["[1", "5", "model: 5", "!!python/object/apply:os.system [true]", "model: {}",
             "peft: {_target_: LoRA}\nmodel: {_target_: x.GPTModelProvider}"],
)  # fmt: skip
def test_a_run_config_that_is_none_is_refused(
    text: str, models: Models, shards: Shards, tmp_path: Path
) -> None:
    path = as_bridge(shards("gqa", "torch_dist", 3, 1), {}, tmp_path / "b")
    (path / "iter_0000001/run_config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"run_config.yaml"):
        open_source(path)
