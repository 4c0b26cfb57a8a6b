"""What config.json says in every family: to `ModelConfig`, and back with a new shape.

Plain JSON on purpose: importing transformers costs seconds on every command. Keys we do not
interpret are kept as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.families.block_configs import FAMILY
from megatron_prune.model.axes import split_layer
from megatron_prune.model.family import Family, Weight
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.model.tensors import DTYPES

CONFIG = "config.json"
_SHORT = {long: short for short, long in DTYPES.items()}


def interpret(family: Family, values: Mapping[str, Any]) -> ModelConfig:
    """The facts that config.json has under the same keys in most families.

    Raises:
        CheckpointError: an activation that we do not compute.
        KeyError: a size is missing.
        ShapeError: sizes that do not fit.
    """

    def get(key: str, default: Any = None) -> Any:
        value = values.get(key)
        return family.defaults.get(key, default) if value is None else value

    if values.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act {values['hidden_act']!r}; wanted silu (SwiGLU models)")
    heads = values["num_attention_heads"]
    base, scaling = _rope(values)
    window = values["sliding_window"] if "sliding_window" in values else get("sliding_window")
    dtype = str(values.get("dtype") or values.get("torch_dtype") or "float32")
    return ModelConfig(
        family=family,
        shape=ModelShape(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=get("num_key_value_heads", heads),
            kv_channels=get("head_dim") or values["hidden_size"] // heads,
            vocab_size=values["vocab_size"],
        ),
        tied=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=family.always_qkv_bias,
        norm_epsilon=float(get("rms_norm_eps", 1e-6)),
        rotary_base=base,
        rope_scaling=scaling,
        max_position_embeddings=int(get("max_position_embeddings", 2048)),
        sliding_window=window,
        init_method_std=float(get("initializer_range", 0.02)),
        dtype=_SHORT.get(dtype.removeprefix("torch."), "fp32"),
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
        CheckpointError: see `check_widths`.
    """
    family, shape = config.family, config.shape
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
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = DTYPES[config.dtype]
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
