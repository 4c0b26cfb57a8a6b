"""What a criterion may know: statistics of the running model, and sizes of its weights.

Both are small: vectors along the model's axes, never a matrix. Axis legend: N norms in the order of
the forward pass (`axes.norm_names`), L layers, D hidden, Q query heads, d kv_channels, F FFN
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import (
    axes_of,
    layer_name,
    layer_weights,
    norm_before,
    norm_names,
    outer_weights,
    split_layer,
    tensor_shape,
)
from megatron_prune.model.blocks import EMBEDDING, OUTPUT
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, LAYER_AXES, ModelConfig, ModelShape
from megatron_prune.sources.finite import nonfinite_text
from megatron_prune.sources.source import Source

_ROWS = 1 << 25  # values of a weight that are looked at together: 256 MB in float64


@dataclass(frozen=True, kw_only=True)
class Observed:
    """Sums over the calibration tokens; float64, whole axes, the same on every rank.

    Attributes:
        norm_abs: [N, D] sum over samples of (mean over the sequence of |norm's output|)^2.
        norm_squares: [N, D] sum over tokens of the norm's output squared.
        norm_energy: [N, D] sum over tokens of (x / rms(x))^2, x the norm's input.
        proj_abs, proj_squares, proj_sums: [L, Q, d] likewise of linear_proj's input, and its sum.
        fc2_abs, fc2_squares, fc2_sums: [L, F] likewise of linear_fc2's input.
        layer_cosine: [L] sum over tokens of the cosine between a layer's input and its output.
        tokens, samples: [1] how many were seen.
    """

    norm_abs: Tensor
    norm_squares: Tensor
    norm_energy: Tensor
    proj_abs: Tensor
    proj_squares: Tensor
    proj_sums: Tensor
    fc2_abs: Tensor
    fc2_squares: Tensor
    fc2_sums: Tensor
    layer_cosine: Tensor
    tokens: Tensor
    samples: Tensor

    @classmethod
    def nothing(cls, config: ModelConfig) -> Observed:
        """Zeros of the right shapes."""
        shape = config.shape
        layers, norms = shape.num_layers, len(norm_names(config))
        norm = (norms, shape.hidden_size)
        proj = (layers, shape.num_attention_heads, shape.kv_channels)
        fc2 = (layers, shape.ffn_hidden_size)
        sizes = {"norm": norm, "proj": proj, "fc2": fc2, "layer": (layers,)}
        return cls(
            **{
                field.name: torch.zeros(sizes.get(field.name.split("_")[0], (1,))).double()
                for field in fields(cls)
            }
        )

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class WeightSquares:
    """Sums of squared weights; float64.

    Attributes:
        readers: [N, D] of the columns that read hidden channel d behind a norm (q, k, v; gate, up;
            the output layer).
        proj: [L, Q, d] of linear_proj's columns.
        fc2: [L, F] of linear_fc2's columns.
        units: axis letter -> all coupled weights of a unit: D [D], Q [L, Q], K [L, K], F [L, F],
            L [L]. A group owns its keys, its values and its heads.
    """

    readers: Tensor
    proj: Tensor
    fc2: Tensor
    units: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Sums over calibration samples and over the weights that a unit owns; float64.

    Attributes:
        first: axis letter -> of |weight x gradient|, shaped as `WeightSquares.units`.
        second: the same of (weight x gradient)^2.
    """

    first: dict[str, Tensor]
    second: dict[str, Tensor]
    samples: int


class UnitSums:
    """Adds values of weights (squares, or |weight x gradient|) up over the units that own them."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        layers = shape.num_layers
        self.sums = {
            "D": torch.zeros(shape.hidden_size).double(),
            "L": torch.zeros(layers).double(),
            **{axis: torch.zeros(layers, shape.size(axis)).double() for axis in LAYER_AXES},
        }

    def add(self, name: str, values: Tensor, first: int = 0) -> None:
        """Add a part of a canonical weight, of any dtype.

        Args:
            values: rows of the tensor; along its split axis it begins at index ``first``.
        """
        layer, _ = split_layer(name)
        axes = axes_of(name)
        if layer is not None:
            self.sums["L"][layer] += values.sum(dtype=torch.float64).cpu()
        for dim, axis in enumerate(axes):
            if not AXES[axis].is_scored:
                continue
            other = [d for d in range(len(axes)) if d != dim]
            x = values.sum(other, dtype=torch.float64) if other else values.double()
            x = x.view(-1, self._shape.rows(axis)).sum(1).cpu()
            into = self.sums[axis] if axis == "D" else self.sums[axis][layer]
            start = 0 if axis == "D" else first
            into[start : start + len(x)] += x

    def units(self) -> dict[str, Tensor]:
        """The sums, a query group's with those of its heads."""
        heads = self.sums["Q"].view(*self.sums["K"].shape, -1).sum(2)
        return {**self.sums, "K": self.sums["K"] + heads}


def weight_squares(
    source: Source,
    progress: Callable[[int], object] = lambda values: None,
    *,
    part: int = 0,
    parts: int = 1,
) -> WeightSquares:
    """Read every weight once, block by block.

    Args:
        progress: told the values just read.
        part: of ``parts`` that together read all weights, each about as many values; the sums of
            their results are the whole's.

    Raises:
        DamagedError: a weight is not finite; names it.
    """
    config, shape = source.config, source.config.shape
    zeros = Observed.nothing(config)
    readers, proj, fc2 = zeros.norm_squares, zeros.proj_squares, zeros.fc2_squares
    units, columns = UnitSums(shape), {"Q": proj, "F": fc2}
    numbers = {norm: number for number, norm in enumerate(norm_names(config))}
    for name in _matrices_and_vectors(config)[part::parts]:
        layer, rest = split_layer(name)
        axes = axes_of(name)
        split = "D" if axes == "D" else next(a for a in axes if a != "D")
        size = shape.size(split)
        per_index = max(1, shape.rows(split) * (shape.hidden_size if len(axes) > 1 else 1))
        step = size if axes == "D" else max(1, _ROWS // per_index)
        for start in range(0, size, step):
            stop = min(start + step, size)
            values = source.read(name, *((start, stop) if axes != "D" else ()))
            squares = values.double().square()
            if not bool(squares.sum().isfinite()):  # fp32 squared is far from float64's end
                raise DamagedError(f"{nonfinite_text(source, name)}; nothing can be scored")
            units.add(name, squares, start)
            # a tied embedding is the output layer too
            norm = norm_before(OUTPUT.name if name == EMBEDDING.name and config.tied else name)
            if norm is not None:
                readers[numbers[norm]] += squares.sum(0)
            for half in config.family.halves:
                if layer is not None and rest == f"{half.output}.weight":
                    into = columns[half.axis][layer, start:stop]
                    into += squares.sum(0).view(into.shape)
            progress(values.numel())
    return WeightSquares(readers=readers, proj=proj, fc2=fc2, units=units.units())


def _matrices_and_vectors(config: ModelConfig) -> list[str]:
    """All weights, like by like and large ones first, so that every n-th is an n-th of them."""
    layers = [
        layer_name(layer, weight.name)
        for layer in range(config.shape.num_layers)
        for weight in layer_weights(config)
    ]
    found = [*layers, *(weight.name for weight in outer_weights(config))]
    return sorted(found, key=lambda name: -prod(tensor_shape(name, config.shape)))
