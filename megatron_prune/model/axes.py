"""The model's tensors by their canonical names: which there are, their axes, their shapes.

All of it follows from the tables of `blocks` and of the model's family.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from megatron_prune.model.blocks import EMBEDDING, FINAL_NORM, HALVES, KNOWN, OUTPUT
from megatron_prune.model.family import Weight
from megatron_prune.model.shape import AXES, ModelConfig, ModelShape

LAYER_PREFIX = "decoder.layers."
_AXES_OF = {weight.name: weight.axes for weight in KNOWN}
_NORM_OF_READER = {
    f"{reader}.weight": f"{half.norm}.weight" for half in HALVES for reader in half.inputs
}


def _holds(weight: Weight, config: ModelConfig) -> bool:
    if weight.when == "untied":
        return not config.tied
    return not weight.when or bool(getattr(config, weight.when))


def layer_weights(config: ModelConfig) -> list[Weight]:
    """The weights of one layer, names without the layer's prefix, in the model's order."""
    return [weight for weight in config.family.layer if _holds(weight, config)]


def outer_weights(config: ModelConfig) -> list[Weight]:
    """The weights outside the layers: embedding, final norm, and the output layer when untied."""
    return [weight for weight in config.family.outer if _holds(weight, config)]


def layer_name(layer: int, rest: str) -> str:
    """Canonical name of a layer's weight."""
    return f"{LAYER_PREFIX}{layer}.{rest}"


def in_layer(layer: int | None, rest: str) -> str:
    """The name of a tensor of a layer, or of one outside."""
    return rest if layer is None else layer_name(layer, rest)


def split_layer(name: str) -> tuple[int | None, str]:
    """``decoder.layers.3.mlp.x`` -> ``(3, "mlp.x")``; a name outside -> ``(None, name)``."""
    if not name.startswith(LAYER_PREFIX):
        return None, name
    layer, _, rest = name.removeprefix(LAYER_PREFIX).partition(".")
    return int(layer), rest


def axes_of(name: str) -> str:
    """The axis letters of a canonical name, one per dim."""
    return _AXES_OF[split_layer(name)[1]]


def norm_before(name: str) -> str | None:
    """The norm whose output a weight reads; None for one that reads something else."""
    if name == OUTPUT.name:
        return FINAL_NORM.name
    layer, rest = split_layer(name)
    norm = _NORM_OF_READER.get(rest)
    return None if norm is None or layer is None else layer_name(layer, norm)


def norm_names(config: ModelConfig) -> list[str]:
    """The N norms of the hidden state in the order of the forward pass; the final one is last."""
    layers = [
        layer_name(layer, f"{half.norm}.weight")
        for layer in range(config.shape.num_layers)
        for half in config.family.halves
    ]
    return [*layers, FINAL_NORM.name]


def split_dim(axes: str) -> int | None:
    """The dim that tensor parallelism splits, None for a replicated tensor."""
    return next((dim for dim, axis in enumerate(axes) if AXES[axis].is_split), None)


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
