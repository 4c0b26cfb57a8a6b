"""The table of named axes: every weight of a model and the axis of each of its dims.

This is the only place that knows which dim of which tensor is what. Letters:

    V vocabulary   D hidden   Q query heads   K key/value groups   F FFN channels   L layers

Q and K own ``kv_channels`` rows per index. V, Q, K and F are split over tensor-parallel ranks, D is
replicated, L is split over pipeline stages. Canonical names are Megatron's, with its fused tensors
taken apart (``linear_q``, ``linear_gate``); `store.names` maps them to what lies on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from megatron_prune.model.shape import ModelConfig, ModelShape

SPLIT_AXES = frozenset("VQKF")
LAYER_PREFIX = "decoder.layers."


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One tensor of the model: canonical name, axis per dim, and the fact that must hold for it."""

    name: str
    axes: str
    when: str = ""


_PER_LAYER = (
    Weight(name="input_layernorm.weight", axes="D"),
    Weight(name="self_attention.linear_q.weight", axes="QD"),
    Weight(name="self_attention.linear_k.weight", axes="KD"),
    Weight(name="self_attention.linear_v.weight", axes="KD"),
    Weight(name="self_attention.linear_q.bias", axes="Q", when="qkv_bias"),
    Weight(name="self_attention.linear_k.bias", axes="K", when="qkv_bias"),
    Weight(name="self_attention.linear_v.bias", axes="K", when="qkv_bias"),
    Weight(name="self_attention.linear_proj.weight", axes="DQ"),
    Weight(name="self_attention.linear_proj.bias", axes="D", when="proj_bias"),
    Weight(name="pre_mlp_layernorm.weight", axes="D"),
    Weight(name="mlp.linear_gate.weight", axes="FD"),
    Weight(name="mlp.linear_up.weight", axes="FD"),
    Weight(name="mlp.linear_gate.bias", axes="F", when="mlp_bias"),
    Weight(name="mlp.linear_up.bias", axes="F", when="mlp_bias"),
    Weight(name="mlp.linear_fc2.weight", axes="DF"),
    Weight(name="mlp.linear_fc2.bias", axes="D", when="mlp_bias"),
)
EMBEDDING = Weight(name="embedding.word_embeddings.weight", axes="VD")
FINAL_NORM = Weight(name="decoder.final_layernorm.weight", axes="D")
OUTPUT = Weight(name="output_layer.weight", axes="VD", when="untied")

_AXES = {weight.name: weight.axes for weight in (*_PER_LAYER, EMBEDDING, FINAL_NORM, OUTPUT)}


def _holds(weight: Weight, config: ModelConfig) -> bool:
    if weight.when == "untied":
        return not config.tied
    return not weight.when or bool(getattr(config, weight.when))


def layer_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one layer, names without the layer's prefix, in the model's order."""
    return [weight for weight in _PER_LAYER if _holds(weight, config)]


def outer_weights(config: ModelConfig) -> list[Weight]:
    """The weights outside the layers: embedding, final norm, and the output layer when untied."""
    return [weight for weight in (EMBEDDING, FINAL_NORM, OUTPUT) if _holds(weight, config)]


def layer_name(layer: int, rest: str) -> str:
    """Canonical name of a layer's weight."""
    return f"{LAYER_PREFIX}{layer}.{rest}"


def split_layer(name: str) -> tuple[int | None, str]:
    """``decoder.layers.3.mlp.x`` -> ``(3, "mlp.x")``; a name outside -> ``(None, name)``."""
    if not name.startswith(LAYER_PREFIX):
        return None, name
    layer, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    return int(layer), rest


def axes_of(name: str) -> str:
    """The axis letters of a canonical name, one per dim."""
    return _AXES[split_layer(name)[1]]


_NORM_BEFORE = {
    "self_attention": "input_layernorm.weight",
    "mlp": "pre_mlp_layernorm.weight",
}


def norm_before(name: str) -> str | None:
    """The norm whose output a weight reads; None for one that reads something else."""
    if name == OUTPUT.name:
        return FINAL_NORM.name
    layer, rest = split_layer(name)
    if layer is None or not axes_of(name).endswith("D") or axes_of(name) == "D":
        return None
    return layer_name(layer, _NORM_BEFORE[rest.partition(".")[0]])


def split_dim(axes: str) -> int | None:
    """The dim that tensor parallelism splits, None for a replicated tensor."""
    return next((dim for dim, axis in enumerate(axes) if axis in SPLIT_AXES), None)


def names(config: ModelConfig) -> Iterator[str]:
    """Every canonical name of the model, in the order of the forward pass."""
    yield EMBEDDING.name
    per_layer = layer_weights(config)
    for layer in range(config.shape.num_layers):
        yield from (layer_name(layer, weight.name) for weight in per_layer)
    yield from (weight.name for weight in outer_weights(config)[1:])


def tensor_shape(name: str, shape: ModelShape) -> tuple[int, ...]:
    """The whole tensor's shape, unpadded and unsplit."""
    layer = split_layer(name)[0]
    return tuple(shape.size(axis, layer) * shape.rows(axis) for axis in axes_of(name))


def count_parameters(config: ModelConfig) -> int:
    """Parameters of the model; tied embeddings count once, padding not at all."""
    shape = config.shape
    weights = layer_weights(config)
    per_layer = {  # of layers with that many FFN channels
        width: sum(
            prod(width if a == "F" else shape.size(a) * shape.rows(a) for a in w.axes)
            for w in weights
        )
        for width in set(shape.ffn_widths)
    }
    outer = sum(prod(tensor_shape(weight.name, shape)) for weight in outer_weights(config))
    return sum(per_layer[width] for width in shape.ffn_widths) + outer
