"""Hugging Face's config.json -> `ModelConfig`, and back with a new shape.

Plain JSON on purpose: importing transformers costs seconds on every command. Keys we do not
interpret are kept as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.errors import CheckpointError, PruneError
from megatron_prune.families import qwen1
from megatron_prune.families.block_configs import (
    ARCHITECTURE,
    AUTO_MAP,
    FAMILY,
    MODEL_TYPE,
    block_configs,
    read_block_configs,
)
from megatron_prune.families.names import FAMILIES
from megatron_prune.model.shape import ModelConfig, ModelShape

CONFIG = "config.json"
_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_DTYPE_WORDS = {short: word for word, short in _DTYPES.items()}


def read_config(path: Path) -> ModelConfig:
    """The model's facts from a config.json.

    Raises:
        CheckpointError: not JSON, a family we do not know, or sizes that do not fit.
    """
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a model configuration: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a model configuration")
    family = next(
        (f for f, t in FAMILIES.items() if t.model_type == values.get("model_type")), None
    )
    if values.get("model_type") == MODEL_TYPE and "block_configs" in values:
        family = FAMILY
    if values.get("model_type") == qwen1.MODEL_TYPE:
        family = qwen1.FAMILY
    if family is None:
        known = ", ".join([*FAMILIES, qwen1.MODEL_TYPE])
        raise CheckpointError(
            f"{path}: model_type {values.get('model_type')!r}; wanted one of {known}"
        )
    try:
        if values["model_type"] == qwen1.MODEL_TYPE:
            values = qwen1.as_qwen2(values)
        return _interpret(family, values)
    except PruneError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: {type(error).__name__}: {error}") from None


def _interpret(family: str, values: Mapping[str, Any]) -> ModelConfig:
    def get(key: str, default: Any = None) -> Any:
        value = values.get(key)
        return facts.defaults.get(key, default) if value is None else value

    facts = FAMILIES[family]
    if values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {values['hidden_act']!r}; wanted silu (SwiGLU models)")
    heads = values["num_attention_heads"]
    if values["model_type"] == MODEL_TYPE:
        widths, groups = read_block_configs(values)
    else:
        widths, groups = (values["intermediate_size"],), get("num_key_value_heads", heads)
    base, scaling = _rope(values)
    window = values["sliding_window"] if "sliding_window" in values else get("sliding_window")
    if family == "qwen2" and not values.get("use_sliding_window"):
        window = None
    attention_bias = bool(values.get("attention_bias", False)) and family == "llama"
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return ModelConfig(
        family=family,
        shape=ModelShape(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=max(widths),
            ffn_per_layer=widths if len(set(widths)) > 1 else None,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
            vocab_size=values["vocab_size"],
        ),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=facts.qkv_bias or attention_bias,
        proj_bias=attention_bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and family == "llama",
        norm_epsilon=float(get("rms_norm_eps", 1e-6)),
        rotary_base=base,
        rope_scaling=scaling,
        max_position_embeddings=int(get("max_position_embeddings", 2048)),
        sliding_window=window,
        init_method_std=float(get("initializer_range", 0.02)),
        dtype=_DTYPES.get(dtype.removeprefix("torch."), "fp32"),
        hf_config=dict(values),
    )


def _rope(values: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or the two keys before it."""
    parameters = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
    base = float(parameters.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
    kind = parameters.pop("type", None)
    parameters.setdefault("rope_type", kind or "default")
    return base, None if parameters["rope_type"] == "default" else parameters


def hf_config(config: ModelConfig, kept_layers: list[int] | None = None) -> dict[str, Any]:
    """config.json of a model: the source's own with the sizes of ``config``.

    Always carries ``head_dim``: pruned shapes break the rule it would be derived by.

    Args:
        kept_layers: source numbers of the layers, to cut per-layer lists in the source's config.

    Raises:
        CheckpointError: layers of different widths in a family that is not Llama.
    """
    family, shape = FAMILIES[config.family], config.shape
    values = dict(config.hf_config) or _fresh_config(config)
    if kept_layers is not None and isinstance(values.get("layer_types"), list):
        values["layer_types"] = [values["layer_types"][layer] for layer in kept_layers]
    values.update(
        model_type=family.model_type,
        architectures=[family.architecture],
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=config.tied,
    )
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = _DTYPE_WORDS[config.dtype]
    values.pop("block_configs", None)
    if shape.ffn_per_layer is not None:
        check_family(config)
        values.update(model_type=MODEL_TYPE, architectures=[ARCHITECTURE])
        values.update(auto_map=AUTO_MAP, block_configs=block_configs(shape))
    return values


def check_family(config: ModelConfig) -> None:
    """Refuse a family that no config.json says with layers of different widths.

    Raises:
        CheckpointError: not Llama.
    """
    if config.family != FAMILY:
        raise CheckpointError(
            f"family {config.family}: layers with different numbers of FFN channels are known to "
            f"those who read them only in family {FAMILY}; prune it without --nonuniform"
        )


def _fresh_config(config: ModelConfig) -> dict[str, Any]:
    """For a model that came without a config.json; both spellings of rope, old and new."""
    rope = dict(config.rope_scaling or {"rope_type": "default"})
    values: dict[str, Any] = {
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_scaling": None if config.rope_scaling is None else dict(config.rope_scaling),
        "rope_parameters": {**rope, "rope_theta": config.rotary_base},
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_method_std,
    }
    if config.family == "llama":
        values |= {"attention_bias": config.proj_bias, "mlp_bias": config.mlp_bias}
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window
    return values
