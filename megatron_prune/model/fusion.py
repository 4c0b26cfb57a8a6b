"""Megatron's storage: which weights lie in one stored tensor, how, and under which name.

``linear_qkv`` holds the q heads, the key and the value of a query group, group by group;
``linear_fc1`` holds gate and up, one below the other, of all channels or of one rank's. This is the
one place that knows: stores, parameters, gradients and low-rank factors ask here.

Shape suffixes: Q query heads x kv_channels, K groups x kv_channels; ``*`` stands for the trailing
dims, absent for a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_prune.model.axes import axes_of, layer_weights, split_dim
from megatron_prune.model.blocks import HALVES
from megatron_prune.model.family import Half
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelConfig, ModelShape


@dataclass(frozen=True, kw_only=True)
class Fused:
    """Linears that are stored as one.

    Attributes:
        parts: canonical modules, in the order in which they lie.
        by_group: every query group has its rows of all parts together; else part follows part.
    """

    stored: str
    parts: tuple[str, ...]
    by_group: bool

    def counts(self, shape: ModelShape) -> tuple[int, ...]:
        """Of a ``by_group`` tensor: heads of each part in one query group."""
        return (shape.heads_per_group, 1, 1)

    def place(self, rest: str) -> int:
        """Which of the parts a canonical weight is."""
        return self.parts.index(rest.rpartition(".")[0])

    def group_rows(self, shape: ModelShape) -> int:
        """Of a ``by_group`` tensor: rows of one query group."""
        return sum(self.counts(shape)) * shape.kv_channels


FUSED = (
    Fused(
        stored="self_attention.linear_qkv",
        parts=tuple(f"self_attention.linear_{part}" for part in "qkv"),
        by_group=True,
    ),
    Fused(
        stored="mlp.linear_fc1",
        parts=("mlp.linear_gate", "mlp.linear_up"),
        by_group=False,
    ),
)
_FUSED_OF = {part: fused for fused in FUSED for part in fused.parts}
# Modules that carry an (empty) `_extra_state` entry, which readers ask for. TE's attention too.
LINEARS = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
TE_ATTENTION = "self_attention.core_attention"


def fused_of(rest: str) -> Fused | None:
    """What a canonical weight, named without its layer, is fused into; None for one that is not."""
    return _FUSED_OF.get(rest.rpartition(".")[0])


def stored_reader(half: Half) -> str:
    """The stored linear behind a half's norm."""
    return stored_name(f"{half.inputs[0]}.weight").removesuffix(".weight")


def stored_name(rest: str) -> str:
    """Canonical name without its layer -> Megatron's, norms by their own name."""
    fused = fused_of(rest)
    return rest if fused is None else f"{fused.stored}.{rest.rpartition('.')[2]}"


# Transformer Engine fuses each norm with the linear behind it, and names it so. Distributed
# checkpoints use these names for every layer spec.
TE_NORMS = {f"{half.norm}.weight": f"{stored_reader(half)}.layer_norm_weight" for half in HALVES}


def megatron_name(rest: str, *, te_norms: bool) -> str:
    """`stored_name`, with ``te_norms`` norms as Transformer Engine names them."""
    return TE_NORMS[rest] if te_norms and rest in TE_NORMS else stored_name(rest)


def parts_of(rest: str, config: ModelConfig) -> list[str]:
    """The canonical weights that lie in a stored tensor; itself when it is one."""
    parts = [w.name for w in layer_weights(config) if stored_name(w.name) == rest]
    return parts or [rest]


def join(parts: Sequence[Tensor], rest: str, shape: ModelShape) -> Tensor:
    """The stored tensor of its parts, whole or a rank's.

    Args:
        parts: [rows, *] each, in the order of `parts_of`.
        rest: canonical name of the first.

    Returns:
        [sum of rows, *], a copy where there are several parts.
    """
    fused = fused_of(rest)
    if fused is None:
        return parts[0]
    if not fused.by_group:
        return torch.cat(list(parts))
    width, trailing = shape.kv_channels, parts[0].shape[1:]
    by_group = [
        x.reshape(-1, count, width, *trailing) for x, count in zip(parts, fused.counts(shape))
    ]
    return torch.cat(by_group, dim=1).reshape(-1, *trailing)


def split(x: Tensor, rest: str, shape: ModelShape) -> Tensor:
    """The part of a stored tensor, whole or a rank's, that a canonical weight is: `join`'s inverse.

    Args:
        x: [rows, *]; of a ``by_group`` tensor whole query groups.
    """
    fused = fused_of(rest)
    if fused is None:
        return x
    number = fused.place(rest)
    if not fused.by_group:
        return x.chunk(len(fused.parts))[number]
    counts = fused.counts(shape)
    x_group = x.reshape(-1, sum(counts), shape.kv_channels, *x.shape[1:])
    first = sum(counts[:number])
    return x_group[:, first : first + counts[number]].reshape(-1, *x.shape[1:])


def stored_shape(rest: str, sizes: Sequence[int], shape: ModelShape) -> tuple[int, ...]:
    """The whole stored tensor's shape; ``sizes`` is that of the canonical weight."""
    fused, (rows, *trailing) = fused_of(rest), sizes
    if fused is not None:
        rows = (
            shape.num_query_groups * fused.group_rows(shape)
            if fused.by_group
            else len(fused.parts) * rows
        )
    return rows, *trailing


@dataclass(frozen=True)
class Piece:
    """A stored part of a tensor: indices ``[start, stop)`` of its split axis.

    ``load(a, b)`` gives the indices ``[a, b)`` *within* the piece, as rows of the tensor.
    """

    start: int
    stop: int
    load: Callable[[int, int], Tensor]


def plain_piece(
    load: Callable[[], Tensor], start: int, stop: int, *, dim: int | None, rows: int
) -> Piece:
    """A stored block that is a piece of a canonical tensor by itself.

    Args:
        load: gives the block, a view where possible.
        start, stop: indices of the split axis it holds; ``rows`` rows of ``dim`` each.
    """

    def take_rows(a: int, b: int) -> Tensor:
        return load() if dim is None else load().narrow(dim, a * rows, (b - a) * rows)

    return Piece(start, stop, take_rows)


def group_piece(
    load: Callable[[], Tensor], rest: str, first_group: int, groups: int, shape: ModelShape
) -> Piece:
    """A weight's piece of a stored block that holds whole query groups of a ``by_group`` tensor."""
    fused, width = fused_of(rest), shape.kv_channels
    assert fused is not None and fused.by_group, rest
    per_group, rows = fused.counts(shape)[fused.place(rest)], fused.group_rows(shape)

    def take_rows(a: int, b: int) -> Tensor:
        first, last = a // per_group, -(-b // per_group)
        x = split(load().narrow(0, first * rows, (last - first) * rows), rest, shape)
        return x.narrow(0, (a - first * per_group) * width, (b - a) * width)

    return Piece(first_group * per_group, (first_group + groups) * per_group, take_rows)


def piece(
    load: Callable[[], Tensor], rest: str, begin: int, count: int, shape: ModelShape
) -> Piece | None:
    """A weight's piece of a block of the whole stored tensor; None where the block has none of it.

    Args:
        load: gives the block, a view where possible.
        begin, count: the block's rows along the split dim.

    Raises:
        ValueError: the block begins or ends inside a query group.
    """
    axes, fused = axes_of(rest), fused_of(rest)
    dim = split_dim(axes)
    assert dim is not None, rest
    if fused is not None and fused.by_group:
        rows = fused.group_rows(shape)
        if begin % rows or count % rows:
            raise ValueError(f"{fused.stored.rpartition('.')[2]} is cut inside a query group")
        return group_piece(load, rest, begin // rows, count // rows, shape)
    rows, size = shape.rows(axes[dim]), shape.size(axes[dim])
    base = 0 if fused is None else fused.place(rest) * size * rows
    low, high = max(begin, base), begin + count
    if fused is not None:
        high = min(high, base + size * rows)
    if low >= high:
        return None
    return plain_piece(
        lambda: load().narrow(dim, low - begin, high - low),
        (low - base) // rows,
        (high - base) // rows,
        dim=dim,
        rows=rows,
    )
