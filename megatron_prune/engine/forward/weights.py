"""The parameters of this rank, from any source at any layout, or drawn from a seed.

For every parameter of the model: read this rank's indices of each canonical tensor, fuse them as
Megatron stores them, copy. Nothing but one tensor's slice is held besides the model, and what the
source was sharded for does not matter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import Module

from megatron_prune.engine.failures import together
from megatron_prune.engine.groups import Groups
from megatron_prune.model import axes
from megatron_prune.model.blocks import EMBEDDING, OUTPUT
from megatron_prune.model.fusion import TE_NORMS, join, parts_of
from megatron_prune.model.grid import part_range
from megatron_prune.model.lora import is_factor
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import generator_of
from megatron_prune.sources.source import Source
from megatron_prune.store.megatron import Read, padded_rows

_NORM_OF = {fused: norm for norm, fused in TE_NORMS.items()}


def _local_slice(name: str, config: ModelConfig, groups: Groups, rows: int, read: Read) -> Tensor:
    """This rank's part of a canonical tensor; ``rows`` is the rank's padded vocabulary."""
    split = axes.split_dim(axes.axes_of(name))
    if split is None:
        return read(name, 0, None)
    axis = axes.axes_of(name)[split]
    size = config.shape.size(axis, axes.split_layer(name)[0])
    if axis != "V":
        return read(name, *part_range(size, groups.tp_rank, groups.grid.tensor_parallel))
    start = groups.tp_rank * rows
    return padded_rows(read, name, size, start, start + rows)


def _local_parameter(
    name: str, rows: int, config: ModelConfig, groups: Groups, read: Read
) -> Tensor:
    """The value of a parameter, by its `canonical_name`."""
    parts = canonical_parts(name, config)
    read_parts = [_local_slice(part, config, groups, rows, read) for part in parts]
    return join(read_parts, axes.split_layer(parts[0])[1], config.shape)


def canonical_parts(name: str, config: ModelConfig) -> list[str]:
    """The canonical tensors that a parameter is made of, by its `canonical_name`."""
    layer, rest = axes.split_layer(name)
    if rest == OUTPUT.name and config.tied:
        rest = EMBEDDING.name  # the last pipeline stage's own copy
    return [axes.in_layer(layer, part) for part in parts_of(rest, config)]


def canonical_name(name: str, config: ModelConfig, groups: Groups) -> str:
    """A parameter's name with its layer's number in the model, norms by their own name; what
    Megatron fuses (``linear_qkv``, ``linear_fc1``) stays fused."""
    first = groups.grid.stage_layers(config.shape.num_layers, groups.pp_rank).start
    layer, rest = axes.split_layer(name)
    rest = _NORM_OF.get(rest, rest)
    return rest if layer is None else axes.layer_name(first + layer, rest)


def _fill(model: Module, config: ModelConfig, groups: Groups, read: Read) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_factor(name):
                continue  # `lora` draws them
            whole = canonical_name(name, config, groups)
            value = _local_parameter(whole, len(parameter), config, groups, read)
            assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
            parameter.copy_(value)


def load_weights(model: Module, source: Source, groups: Groups) -> None:
    """Set this rank's parameters to the source's, cast to the model's dtype.

    Raises:
        DamagedError: a tensor is not what the source promised.
        DistributedError: another rank met an error; every rank raises.
        PruneError: ranks opened different models.
    """
    groups.ranks.agree_on(f"the model in {source.path}", lambda: source.digest)
    together(groups.ranks, lambda: _fill(model, source.config, groups, source.read))


def load_layer(module: Module, source: Source, layer: int, groups: Groups) -> None:
    """Set the parameters of one transformer layer to those of the source's layer ``layer``.

    Raises:
        DamagedError, DistributedError: see `load_weights`.
    """

    def fill() -> None:
        with torch.no_grad():
            for rest, parameter in module.named_parameters():
                name = axes.layer_name(layer, _NORM_OF.get(rest, rest))
                value = _local_parameter(name, len(parameter), source.config, groups, source.read)
                assert value.shape == parameter.shape, (name, value.shape, parameter.shape)
                parameter.copy_(value)

    together(groups.ranks, fill)


def draw_weights(model: Module, config: ModelConfig, groups: Groups, seed: int) -> None:
    """Random parameters, the same for the same seed whatever TP and PP.

    As Megatron draws them: normal with ``init_method_std``, the two projections back into the
    hidden stream with that over ``sqrt(2 * num_layers)``, norms one, biases zero. Each whole tensor
    comes from a generator seeded with (seed, name) and is then sliced, which costs each rank the
    drawing of its stage's whole tensors.
    """
    scaled = config.init_method_std / math.sqrt(2 * config.shape.num_layers)

    def draw(name: str, start: int, stop: int | None) -> Tensor:
        shape = axes.tensor_shape(name, config.shape)
        if len(shape) == 1:
            whole = torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        else:
            is_output = axes.axes_of(name)[0] == "D"
            std = scaled if is_output else config.init_method_std
            whole = torch.randn(shape, generator=generator_of(seed, name)) * std
        split = axes.split_dim(axes.axes_of(name))
        if split is None or stop is None:
            return whole
        rows = config.shape.rows(axes.axes_of(name)[split])
        return whole.narrow(split, start * rows, (stop - start) * rows)

    _fill(model, config, groups, draw)
