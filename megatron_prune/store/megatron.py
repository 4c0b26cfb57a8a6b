"""Megatron's storage, common to both of its formats: which rank stores what, fused how.

Writing: `atoms` lists one rank's stored tensors as *atoms*, each a whole row range of one stored
tensor (``linear_fc1`` is two: gate and up; an embedding is several). Reading is the inverse: a
format lists stored blocks, and `fusion` turns each into a piece of a canonical tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import layer_name, layer_weights, split_dim
from megatron_prune.model.blocks import EMBEDDING, FINAL_NORM, OUTPUT
from megatron_prune.model.family import Weight
from megatron_prune.model.fusion import fused_of, join, megatron_name, parts_of
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size, part_range
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.sources.source import Source
from megatron_prune.store.writer import BLOCK_BYTES

Read = Callable[[str, int, "int | None"], Tensor]
"""Indices ``[start, stop)`` of a canonical tensor's split axis, as `Source.read` gives them."""

ITERATION = 1  # of everything written file to file; training counts its own


@dataclass(frozen=True, kw_only=True)
class Atom:
    """A part of one rank's share of a stored tensor.

    Attributes:
        name: stored name without its layer; ``layer`` in the model's numbering or None.
        shape: the atom's own shape.
        dim: the dim along which it lies among its siblings, None for a replicated tensor.
        local_size: the size of the rank's tensor along ``dim``.
        global_start, global_size: where it begins in the whole stored tensor along ``dim``, and
            that tensor's size there.
        pull: reads, cuts and fuses it.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    dim: int | None
    local_size: int = 0
    global_start: int = 0
    global_size: int = 0
    pull: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def _with(self, size: int) -> tuple[int, ...]:
        return tuple(size if dim == self.dim else n for dim, n in enumerate(self.shape))

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.shape if self.dim is None else self._with(self.local_size)

    @property
    def global_shape(self) -> tuple[int, ...]:
        return self.shape if self.dim is None else self._with(self.global_size)

    @property
    def global_offset(self) -> tuple[int, ...]:
        return tuple(self.global_start if dim == self.dim else 0 for dim in range(len(self.shape)))


def atoms(
    source: Source, grid: ParallelGrid, tp_rank: int, pp_rank: int, *, te_norms: bool, shared: bool
) -> Iterator[Atom]:
    """Everything one model-parallel rank stores, in the order of the forward pass.

    Args:
        te_norms: name the norms as Transformer Engine's layer spec does.
        shared: the format shares tensors between ranks: replicated ones come from ``tp_rank`` 0
            only, and a tied output layer is not stored a second time.
    """
    rank = _RankAtoms(source, grid, tp_rank, te_norms, skip_replicated=shared and tp_rank > 0)
    config = source.config
    if pp_rank == 0:
        yield from rank.vocabulary(EMBEDDING.name, EMBEDDING.name)
    for layer in grid.stage_layers(config.shape.num_layers, pp_rank):
        yield from rank.layer(layer)
    if pp_rank < grid.pipeline_parallel - 1:
        return
    yield from rank.plain(None, FINAL_NORM)
    if not config.tied:
        yield from rank.vocabulary(OUTPUT.name, OUTPUT.name)
    elif grid.pipeline_parallel > 1 and not shared:
        yield from rank.vocabulary(OUTPUT.name, EMBEDDING.name)


def by_stage(ranks: Mapping[str, tuple[int, int]]) -> list[list[str]]:
    """Files of ``(tp_rank, pp_rank)``, those of one pipeline stage together."""
    stages: dict[int, list[str]] = {}
    for file, (_, pp_rank) in ranks.items():
        stages.setdefault(pp_rank, []).append(file)
    return list(stages.values())


class _RankAtoms:
    def __init__(
        self,
        source: Source,
        grid: ParallelGrid,
        tp_rank: int,
        te_norms: bool,
        skip_replicated: bool,
    ) -> None:
        self.source, self.shape = source, source.config.shape
        self.parts, self.part = grid.tensor_parallel, tp_rank
        self.te_norms, self.skip_replicated = te_norms, skip_replicated

    def layer(self, layer: int) -> Iterator[Atom]:
        for weight in layer_weights(self.source.config):
            fused = fused_of(weight.name)
            if fused is None or not fused.by_group:
                yield from self.plain(layer, weight)
            elif weight.name.startswith(f"{fused.parts[0]}."):
                yield self.groups(layer, weight)

    def plain(self, layer: int | None, weight: Weight) -> Iterator[Atom]:
        """A tensor stored as it is, or one below others."""
        axes, read, rest = weight.axes, self.source.read, weight.name
        dim, name = split_dim(axes), rest if layer is None else layer_name(layer, rest)
        sizes = [self.shape.size(axis) * self.shape.rows(axis) for axis in axes]
        stored, dtype = megatron_name(rest, te_norms=self.te_norms), self.source.dtype(name)
        if dim is None:
            if not self.skip_replicated:
                yield Atom(
                    name=stored, layer=layer, shape=tuple(sizes), dtype=dtype, dim=None,
                    pull=lambda: read(name),
                )  # fmt: skip
            return
        whole, rows = sizes[dim], self.shape.rows(axes[dim])
        start, stop = part_range(self.shape.size(axes[dim]), self.part, self.parts)
        sizes[dim] = local = (stop - start) * rows
        beside = parts_of(stored, self.source.config)
        count, at = len(beside), beside.index(rest)
        yield Atom(
            name=stored, layer=layer, shape=tuple(sizes), dtype=dtype, dim=dim,
            local_size=count * local,
            global_start=at * whole + start * rows, global_size=count * whole,
            pull=lambda: read(name, start, stop),
        )  # fmt: skip

    def groups(self, layer: int, first: Weight) -> Atom:
        """A tensor fused group by group: this rank's query groups. ``first`` is its first part."""
        shape, read, config = self.shape, self.source.read, self.source.config
        stored, fused = megatron_name(first.name, te_norms=self.te_norms), fused_of(first.name)
        assert fused is not None
        start, stop = part_range(shape.num_query_groups, self.part, self.parts)
        per_group = fused.group_rows(shape)
        rows = (stop - start) * per_group
        trailing = (shape.hidden_size,) if first.name.endswith("weight") else ()
        parts = [layer_name(layer, rest) for rest in parts_of(stored, config)]

        def pull() -> Tensor:
            read_parts = [
                read(name, start * count, stop * count)
                for name, count in zip(parts, fused.counts(shape), strict=True)
            ]
            return join(read_parts, first.name, shape)

        return Atom(
            name=stored, layer=layer, shape=(rows, *trailing), dtype=self.source.dtype(parts[0]),
            dim=0, local_size=rows,
            global_start=start * per_group, global_size=shape.num_query_groups * per_group,
            pull=pull,
        )  # fmt: skip

    def vocabulary(self, stored: str, name: str) -> Iterator[Atom]:
        """Embedding rows of this rank in blocks, padded."""
        shape, dtype = self.shape, self.source.dtype(name)
        padded = padded_vocab_size(shape.vocab_size, self.parts)
        start, stop = part_range(padded, self.part, self.parts)
        step = max(1, BLOCK_BYTES // (shape.hidden_size * dtype.itemsize))
        for at in range(start, stop, step):
            upto = min(at + step, stop)
            yield Atom(
                name=stored, layer=None, shape=(upto - at, shape.hidden_size), dtype=dtype, dim=0,
                local_size=stop - start,
                global_start=at, global_size=padded,
                pull=partial(padded_rows, self.source.read, name, shape.vocab_size, at, upto),
            )  # fmt: skip


def padded_rows(read: Read, name: str, vocab_size: int, start: int, stop: int) -> Tensor:
    """Rows ``[start, stop)`` of a vocabulary tensor ``[V, D]`` as Megatron pads it.

    Megatron's own converters pad with copies of the last row: they disturb the softmax of a reader
    that does not mask them less than zeros do.

    Returns:
        ``[stop - start, D]`` in the stored dtype; a view where no padding is among the rows.
    """
    if stop <= vocab_size:
        return read(name, start, stop)
    last = read(name, vocab_size - 1, vocab_size).expand(stop - max(start, vocab_size), -1)
    return last if start >= vocab_size else torch.cat([read(name, start, vocab_size), last])


_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")


def is_of_the_model(key: str) -> bool:
    """Whether a stored key is of a GPT model, and not of its optimizer or another framework."""
    return key.startswith(_OF_THE_MODEL)


def stored_layer(key: str) -> int:
    """The layer in a stored key, -1 in one that has none."""
    match = re.match(r"decoder\.layers\.([0-9]{1,6})\.", key)
    return int(match[1]) if match else -1


def refuse_own_head(where: object, found: str) -> None:
    """Refuse a tied model that holds an output layer beside its embedding.

    Raises:
        DamagedError: always; ``found`` says how the two are at odds.
    """
    raise DamagedError(
        f"{where}: its configuration says that output layer and embedding are tied, {found}; "
        "correct the one that is wrong (tie_word_embeddings in hf/config.json, or "
        "untie_embeddings_and_output_weights in its arguments)"
    )


def check_names(where: object, wanted: Collection[str], held: Collection[str]) -> None:
    """Refuse stored tensors that are too few for a configuration, or too many.

    Args:
        held: keys of tensors; those of optimizer, random state and the like do not count.

    Raises:
        DamagedError: with the names.
    """
    missing = sorted(set(wanted) - set(held))
    unexpected = sorted(
        key for key in set(held) - set(wanted)
        if is_of_the_model(key) and "_extra_state" not in key
    )  # fmt: skip
    if missing or unexpected:
        raise DamagedError(
            f"{where}: {len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected "
            f"{unexpected[:3]}; its configuration describes another model, or the copy is not "
            "complete"
        )
