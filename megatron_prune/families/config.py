"""What config.json says in every family: to `ModelConfig`, and back with a new shape.

Plain JSON on purpose: importing transformers costs seconds on every command. Keys we do not
interpret are kept as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.families.block_configs import FAMILY
from megatron_prune.families.unread import check_keys
from megatron_prune.families.windows import keep_layers
from megatron_prune.model.axes import split_layer
from megatron_prune.model.family import Family, Weight
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.model.tensors import DTYPE_WORDS, DTYPES

CONFIG = "config.json"
_OLD_LENGTH = ("llama3", "yarn", "longrope")  # their parameters name the length before scaling


def interpret(family: Family, values: Mapping[str, Any]) -> ModelConfig:
    """The facts that config.json has under the same keys in most families.

    Where keys say the same thing twice, the one that transformers 5 takes counts; the table in
    docs/reading.md has them all.

    Raises:
        CheckpointError: an activation that we do not compute, or see `check_keys`.
        KeyError: a size is missing.
        ShapeError: sizes that do not fit.
    """

    def get(key: str, default: Any = None) -> Any:
        value = values.get(key)
        return family.defaults.get(key, default) if value is None else value

    check_keys(values)
    if values.get("hidden_act", "silu") not in ("silu", "swish"):  # the same, in transformers
        raise CheckpointError(f"hidden_act {values['hidden_act']!r}; wanted silu (SwiGLU models)")
    heads = values["num_attention_heads"]
    base, scaling = _rope(family, values)
    groups = values.get("num_key_value_heads", family.defaults.get("num_key_value_heads"))
    return ModelConfig(
        family=family,
        shape=ModelShape(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=heads if groups is None else groups,
            kv_channels=get("head_dim") or values["hidden_size"] // heads,
            vocab_size=values["vocab_size"],
        ),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family.always_qkv_bias,
        norm_epsilon=float(get("rms_norm_eps", 1e-6)),
        rotary_base=base,
        rope_scaling=scaling,
        max_position_embeddings=int(get("max_position_embeddings")),
        sliding_window=family.window(values),
        init_method_std=float(get("initializer_range", 0.02)),
        dtype=DTYPE_WORDS.get(told_dtype(values) or "float32", "fp32"),
        hf_config=dict(values),
    )


def told_dtype(values: Mapping[str, Any]) -> str | None:
    """What config.json calls its weights' dtype, None where it is silent; ``dtype`` counts before
    the older ``torch_dtype``."""
    word = values.get("dtype") or values.get("torch_dtype")
    return None if word is None else str(word).removeprefix("torch.")


def _rope(family: Family, values: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from ``rope_parameters`` (transformers 5) or the two keys before it.

    Of both spellings ``rope_scaling`` counts before ``rope_parameters``, a ``rope_theta`` inside
    before the one at the top, and ``rope_type`` before ``type`` (convert_rope_params_to_dict in
    modeling_rope_utils.py of transformers 5.23).

    Raises:
        CheckpointError: not an object, or one for each kind of layer.
    """
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    found = old or new or {}
    if not isinstance(found, Mapping) or any(isinstance(x, Mapping) for x in found.values()):
        raise CheckpointError(
            f"rope_parameters {str(found)[:80]}: wanted one object for all layers, which is what "
            f"family {family} of transformers 5 reads"
        )
    if old and new and old != new:
        warnings.warn(
            f"config.json has rope_scaling {old} and rope_parameters {new}; the first counts, as "
            "in transformers 5",
            stacklevel=2,
        )
    parameters = dict(found)
    base = float(parameters.pop("rope_theta", None) or values.get("rope_theta") or 10000.0)
    top = values.get("rope_theta")
    if top is not None and float(top) != base:
        warnings.warn(
            f"config.json has rope_theta {top} at the top and {base} within; the second counts, as "
            "in transformers 5",
            stacklevel=2,
        )
    kind = parameters.pop("type", None)
    parameters.setdefault("rope_type", kind or "default")
    if parameters["rope_type"] == "default":
        return base, None
    if parameters["rope_type"] in _OLD_LENGTH:
        longest = values.get("max_position_embeddings", family.defaults["max_position_embeddings"])
        parameters.setdefault("original_max_position_embeddings", longest)
    return base, parameters


def hf_config(config: ModelConfig, kept_layers: list[int] | None = None) -> dict[str, Any]:
    """config.json of a model: the source's own with the sizes of ``config``.

    Always carries ``head_dim``: pruned shapes break the rule it would be derived by.

    Args:
        kept_layers: source numbers of the layers, to cut per-layer lists in the source's config.

    Raises:
        CheckpointError: see `check_widths`.
    """
    family, shape = config.family, config.shape
    values = dict(config.hf_config) or _fresh_config(config)
    if kept_layers is not None:
        values.update(keep_layers(values, kept_layers))
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
    word = told_dtype(values)
    if word is None or DTYPE_WORDS.get(word, "fp32") != config.dtype:
        for key in [key for key in ("dtype", "torch_dtype") if values.get(key)] or ["dtype"]:
            values[key] = DTYPES[config.dtype]
    values.pop("block_configs", None)
    if shape.ffn_per_layer is not None:
        values.update(check_widths(family)(shape))
    return values


def check_widths(family: Family) -> Callable[[ModelShape], Mapping[str, Any]]:
    """What writes layers of different widths into a config.json of the family.

    Raises:
        CheckpointError: nothing that reads the family knows such layers.
    """
    if family.write_widths is None:
        raise CheckpointError(
            f"family {family}: layers with different numbers of FFN channels are known to "
            f"those who read them only in family {FAMILY}; prune it without --nonuniform"
        )
    return family.write_widths


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
    return {**values, **config.family.fresh(config)}


def hf_place(name: str, family: Family) -> tuple[str, int, int]:
    """Canonical name -> the tensor of Hugging Face's that it is in, and which of how many equal
    blocks of its rows it is."""
    layer, rest = split_layer(name)
    weights: tuple[Weight, ...] = family.outer if layer is None else family.layer
    weight = next(weight for weight in weights if weight.name == rest)
    prefix = "" if layer is None else f"{family.hf_layers}.{layer}."
    return f"{prefix}{weight.hf}", *weight.hf_block


def hf_name(name: str, family: Family) -> str:
    """Canonical name -> the name under which Hugging Face has it by itself."""
    return hf_place(name, family)[0]
