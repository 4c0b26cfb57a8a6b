"""Keys of config.json that say the same thing twice: what transformers 5 takes of them counts."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_prune.errors import CheckpointError
from megatron_prune.families import read_config
from megatron_prune.families.config import hf_config
from megatron_prune.families.windows import windowed_layers
from megatron_prune.model.shape import ModelConfig
from tests.pico import IDS, LLAMA3, edit_config, ok, refused, tensors

SIZES = {
    "num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6,
    "num_key_value_heads": 3, "vocab_size": 379,
}  # fmt: skip
LAYERS = 6
FULL, WINDOW = "full_attention", "sliding_attention"
LINEAR = {"type": "linear", "factor": 4.0}


def both(tmp_path: Path, model_type: str, **values: Any) -> tuple[ModelConfig, Any]:
    """A config.json as we read it, and as transformers does."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **SIZES, **values}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_config(path), AutoConfig.from_pretrained(tmp_path)


def their_window(config: Any) -> int | None:
    return config.sliding_window if WINDOW in config.layer_types else None


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_windows_are_those_of_transformers_and_stay_with_their_layers(
    model_type: str, tmp_path: Path
) -> None:
    choices = {
        "use_sliding_window": [None, False, True],
        "sliding_window": [None, 8],
        "max_window_layers": [None, 0, 3, 6],
        "layer_types": [None, [FULL] * 6, [FULL] * 4 + [WINDOW] * 2, [FULL, WINDOW] * 3],
    }
    for found in product(*choices.values()):
        values = {key: x for key, x in zip(choices, found, strict=True) if x is not None}
        if WINDOW in values.get("layer_types", []) and not values.get("use_sliding_window"):
            with pytest.raises(CheckpointError, match="layer_types has sliding_attention"):
                both(tmp_path, model_type, **values)
            continue
        ours, theirs = both(tmp_path, model_type, **values)
        assert ours.sliding_window == their_window(theirs), values
        if ours.sliding_window is not None:
            kinds = [WINDOW if windowed else FULL for windowed in windowed_layers(ours.hf_config)]
            assert kinds == theirs.layer_types
        for kept in ([0, 1, 2, 3, 4], [2, 4, 5], [0, 5], [3, 4]):
            written = {**hf_config(ours, kept), "num_hidden_layers": len(kept)}
            (tmp_path / "config.json").write_text(json.dumps(written))
            after = AutoConfig.from_pretrained(tmp_path)
            assert after.layer_types == [theirs.layer_types[layer] for layer in kept], values
            assert ours.family.window(written) == their_window(after)


@pytest.mark.parametrize(
    "values",
    [
        {"layer_types": [FULL] * 5},
        {"layer_types": [FULL] * 5 + ["chunked_attention"]},
        {"layer_types": [FULL] * 5 + [WINDOW]},
    ],
)
def test_layer_kinds_that_transformers_does_not_run_are_refused(
    values: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **SIZES, **values}))
    with pytest.raises(CheckpointError, match="layer_types"):
        read_config(tmp_path / "config.json")
    with pytest.raises((StrictDataclassError, AttributeError, TypeError)):
        config = AutoConfig.from_pretrained(tmp_path)
        AutoModelForCausalLM.from_config(config)(IDS)


def test_windows_of_families_that_have_none_or_all(tmp_path: Path) -> None:
    assert both(tmp_path, "llama", sliding_window=8)[0].sliding_window is None
    assert both(tmp_path, "mistral")[0].sliding_window == 4096
    with pytest.raises(CheckpointError, match="ministral"):
        both(tmp_path, "mistral", layer_types=[FULL] * 6)
    assert AutoConfig.from_pretrained(tmp_path).model_type == "ministral"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_rope_and_heads_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    choices = {
        "rope_scaling": [..., None, {}, LINEAR, {**LINEAR, "rope_theta": 7e4}],
        "rope_parameters": [..., None, {"rope_type": "default", "rope_theta": 5e4},
                            {**LLAMA3, "type": "linear"}],
        "rope_theta": [..., 9e4],
        "num_key_value_heads": [3] if model_type == "mistral" else [None, 3],
        "head_dim": [..., 16],
    }  # fmt: skip
    for found in product(*choices.values()):
        values = {key: x for key, x in zip(choices, found, strict=True) if x is not ...}
        ours, theirs = both(tmp_path, model_type, **json.loads(json.dumps(values)))
        rope = dict(theirs.rope_parameters)
        rope.pop("type", None)
        assert ours.rotary_base == rope.pop("rope_theta"), values
        assert (ours.rope_scaling or {"rope_type": "default"}) == rope, values
        assert ours.shape.num_query_groups == theirs.num_key_value_heads, values
        assert ours.shape.kv_channels == getattr(theirs, "head_dim", 8), values
        assert ours.max_position_embeddings == theirs.max_position_embeddings


def test_the_length_before_scaling_is_the_models_where_it_is_not_said(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    ours, theirs = both(tmp_path, "llama", rope_scaling=yarn, original_max_position_embeddings=16)
    length = "original_max_position_embeddings"
    assert ours.rope_scaling is not None
    assert ours.rope_scaling[length] == theirs.rope_parameters[length] == 2048


def test_one_rope_for_each_kind_of_layer_is_refused(tmp_path: Path) -> None:
    """transformers reads it and then has no rope_type."""
    values = {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e4}}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **SIZES, **values}))
    with pytest.raises(CheckpointError, match="one object for all layers"):
        read_config(tmp_path / "config.json")
    with pytest.raises(KeyError):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("compression_config", {"format": "int-quantized"}),
        ("per_layer_config", {"1": {"intermediate_size": 48}}),
        ("configuration_files", ["config.5.0.0.json"]),
        ("text_config", {"model_type": "llama"}),
        ("transformers_weights", "other.safetensors"),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {**LINEAR, "partial_rotary_factor": 0.5}),
    ],
)
def test_keys_that_make_another_model_are_refused_by_name(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **SIZES, key: value}))
    with pytest.raises(CheckpointError, match=key.replace("rope_parameters", "partial")):
        read_config(path)


def test_both_words_for_the_dtype_change_together(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, "llama", dtype="bfloat16", torch_dtype="float16")
    assert (ours.dtype, theirs.dtype) == ("bf16", torch.bfloat16)
    written = hf_config(replace(ours, dtype="fp32"))
    assert (written["dtype"], written["torch_dtype"]) == ("float32", "float32")
    same = both(tmp_path, "llama", torch_dtype="float64")[0]
    assert hf_config(same)["torch_dtype"] == "float64"


def logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(IDS).logits


def test_an_output_layer_beside_a_tied_embedding_is_what_transformers_makes_of_it(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(models("tied"), tmp_path / "source"))
    found = load_file(path / "model.safetensors")
    embedding = found["model.embed_tokens.weight"]
    own = embedding.clone()
    own[-1, -1] += 1  # one value differs, the last one
    for head, tied in ((embedding.clone(), True), (own, False)):
        save_file({**found, "lm_head.weight": head}, path / "model.safetensors")
        out = tmp_path / f"out{tied}"
        done = ok("convert", "--load", path, "--save", out, "--to", "hf")
        assert ("values of its own" in done.err) != tied
        assert torch.equal(logits(path), logits(out))
        assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == tied
        assert ("lm_head.weight" in tensors(out)) != tied
    alone = {n: x for n, x in found.items() if n != "model.embed_tokens.weight"}
    save_file({**alone, "lm_head.weight": embedding.clone()}, path / "model.safetensors")
    ok("convert", "--load", path, "--save", tmp_path / "alone", "--to", "hf")
    assert torch.equal(logits(models("tied")), logits(tmp_path / "alone"))


def test_an_output_layer_of_its_own_is_refused_in_megatrons_formats(
    shards: Callable[..., Path], tmp_path: Path
) -> None:
    for number, layout in enumerate((("torch", 1, 2), ("torch_dist", 1, 1))):
        path = tmp_path / str(number)
        ignore = shutil.ignore_patterns("manifest.json")
        shutil.copytree(shards("tied" if number == 0 else "gqa", *layout), path, ignore=ignore)
        if number == 0:
            file = next(path.glob("iter_*/mp_rank_00_001/model_optim_rng.pt"))
            state = torch.load(file, weights_only=False)
            state["model"]["output_layer.weight"][0, 0] += 1
            torch.save(state, file)
        else:
            edit_config(next(path.glob("iter_*/hf/config.json")), tie_word_embeddings=True)
        refused("inspect", path, says="output layer and embedding are tied", code=3)


def test_a_silent_config_gets_the_dtype_of_the_weights(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(models("bf16"), tmp_path / "source"))
    values = json.loads((path / "config.json").read_text())
    values.pop("dtype", None)
    (path / "config.json").write_text(json.dumps(values))
    ok("convert", "--load", path, "--save", tmp_path / "m", "--to", "megatron")
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "out", "--to", "hf")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    found = load_file(path / "model.safetensors")
    found["lm_head.weight"] = found["lm_head.weight"].float()
    save_file(found, path / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(path).dtype
    done = ok("convert", "--load", path, "--save", tmp_path / "mixed", "--to", "hf")
    assert "bfloat16 and float32" in done.err
    said = json.loads((tmp_path / "mixed/config.json").read_text())["dtype"]
    assert said == str(theirs).removeprefix("torch.")
