"""Gates folded into weights, so that a pruned model computes what the gated model did.

While gates are trained (Xia et al. 2023, arXiv:2310.06694, section 2.1) they multiply activations:
the embedding's output and every norm's output by the hidden gates, each half's output by the hidden
gates and its layer's gate, the inputs of ``linear_proj`` by the gate of their head times that of
its query group, the inputs of ``linear_fc2`` by the gates of the FFN channels. A norm's mean square
is over channels whose gate is not 0. When units whose gate is 0 are cut, those that stay keep soft
gates (0.996 at most, of hard concrete), and each of these products is one with a weight:

    embedding                  columns x hidden
    norms of a layer           x hidden
    final norm                 x hidden, where the output layer is apart from the embedding
    half.projection, weight    rows x (hidden x layer), columns x axis gate
    half.projection, bias      x (hidden x layer)

A tied output layer is the embedding, which has the hidden gates already, so the final norm is left
alone; the official code folds them into the norm and into the output layer, which is twice.
Everything else reads what is gated before it, and is left alone too.

Pure functions of float32 tensors; whoever reads a model through them is `sources.folded`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_prune.errors import ShapeError
from megatron_prune.model.axes import axes_of, split_dim, split_layer
from megatron_prune.model.blocks import EMBEDDING, FINAL_NORM
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, SCORED_AXES, ModelConfig, ModelShape


@dataclass(frozen=True, kw_only=True, eq=False)
class Gates:
    """The gates of the units that stay, in the numbering of the pruned model.

    Attributes:
        shape: of the pruned model.
        by_axis: letter of an axis -> float32 gates of its units, detached and in host memory: [D]
            for the model, [L] one a layer, [L, Q], [L, K] and [L, F] for each layer. Any of them;
            an axis without gates is as if all of its gates were 1.

    Raises:
        ShapeError: no gates at all, or of an axis that can have none; gates of another shape or
            dtype, one that is not finite or is below 0, or a hidden gate of 0: the gated norm does
            not count its channel, the pruned model's norm would.
    """

    shape: ModelShape
    by_axis: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if not self.by_axis:
            raise ShapeError(f"no gates; wanted some of the axes {list(SCORED_AXES)}")
        for axis, gates in self.by_axis.items():
            if axis not in SCORED_AXES:
                raise ShapeError(f"gates of axis {axis!r:.60}; wanted some of {list(SCORED_AXES)}")
            if axis == "F":
                self.shape.check_uniform("gates of ffn", "gate a model of equal layers")
            _check_sizes(axis, gates, self.shape)
            _check_values(axis, gates)

    @property
    def words(self) -> tuple[str, ...]:
        """The gated axes, as plan files call them."""
        return tuple(AXES[axis].word for axis in SCORED_AXES if axis in self.by_axis)


def _check_sizes(axis: str, gates: Tensor, shape: ModelShape) -> None:
    assert not gates.requires_grad and gates.device.type == "cpu", axis
    size = (shape.size(axis),)
    wanted = (shape.num_layers, *size) if AXES[axis].is_per_layer else size
    if tuple(gates.shape) != wanted or gates.dtype != torch.float32:
        raise ShapeError(
            f"gates of {AXES[axis].word}: are {tuple(gates.shape)} {gates.dtype}; wanted {wanted} "
            "torch.float32, one of each unit that the pruned model has"
        )


def _check_values(axis: str, gates: Tensor) -> None:
    is_good = gates.isfinite() & (gates > 0 if axis == "D" else gates >= 0)
    if bool(is_good.all()):
        return
    place = tuple((~is_good).nonzero()[0].tolist())
    where = f"layer {place[0]}, " if AXES[axis].is_per_layer else ""
    wanted = "above 0" if axis == "D" else "0 or more"
    raise ShapeError(
        f"gates of {AXES[axis].word}: {where}{AXES[axis].unit} {place[-1]} has {gates[place]:g}; "
        f"wanted a number, {wanted}"
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """What a tensor is multiplied by: float32, one for each row, one for each column of it; None
    where there is nothing to multiply by."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def fold_factors(name: str, config: ModelConfig, gates: Gates) -> Factors:
    """The factors of a whole tensor of the pruned model.

    Args:
        name: canonical.
        config: of the pruned model.
    """
    hidden = gates.by_axis.get("D")
    layer, rest = split_layer(name)
    if layer is None:
        if name == FINAL_NORM.name and not config.tied:
            return Factors(rows=hidden)
        return Factors(columns=hidden if name == EMBEDDING.name else None)
    for half in config.family.halves:
        if rest == f"{half.norm}.weight":
            return Factors(rows=hidden)
        if rest == f"{half.output}.weight":
            rows = _output_gates(gates, layer)
            return Factors(rows=rows, columns=_input_gates(gates, half.axis, layer))
        if rest == f"{half.output}.bias":
            return Factors(rows=_output_gates(gates, layer))
    return Factors()


def fold(
    name: str, x: Tensor, config: ModelConfig, gates: Gates, start: int = 0, stop: int | None = None
) -> Tensor:
    """Fold the gates into a part of a tensor of the pruned model.

    Every value is multiplied by itself, in float32, by its row's factor first, so a part has the
    bits of the whole's.

    Args:
        x: indices ``[start, stop)`` of the tensor's split axis, as `Source.read` gives them.
        config: of the pruned model.

    Returns:
        In the dtype of ``x``: a copy, or ``x`` itself where nothing is folded into it.
    """
    factors = fold_factors(name, config, gates)
    axes = axes_of(name)
    parts = [factors.rows, factors.columns][: len(axes)]
    if all(part is None for part in parts):
        return x
    folded, split = x.to(torch.float32, copy=True), split_dim(axes)
    for dim, part in enumerate(parts):
        if part is None:
            continue
        if dim == split:
            rows = config.shape.rows(axes[dim])
            part = part[start * rows : None if stop is None else stop * rows]
        folded *= part if dim == len(axes) - 1 else part[:, None]
    return folded.to(x.dtype)


def _output_gates(gates: Gates, layer: int) -> Tensor | None:
    """[D], of what a half adds to the hidden state."""
    hidden, layers = gates.by_axis.get("D"), gates.by_axis.get("L")
    if layers is None:
        return hidden
    if hidden is None:
        return layers[layer].expand(gates.shape.hidden_size)
    return hidden * layers[layer]


def _input_gates(gates: Gates, axis: str, layer: int) -> Tensor | None:
    """Of the columns of a projection whose inputs are the units of ``axis``."""
    own = gates.by_axis[axis][layer] if axis in gates.by_axis else None
    if axis == "Q" and "K" in gates.by_axis:
        groups = gates.by_axis["K"][layer].repeat_interleave(gates.shape.heads_per_group)
        own = groups if own is None else own * groups
    return None if own is None else own.repeat_interleave(gates.shape.rows(axis))
