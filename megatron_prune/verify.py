"""An independent check of a pruned checkpoint: plain indexing by the plan's own numbers.

Shares no slicing code with `surgery`: it reads whole tensors of the source, expands the plan's
indices itself, and compares every value. Holds a few blocks of rows; reads both checkpoints once.
Tensors that a repair replaced are held to the SHA-256 in its record, which is in the manifest.
Where gates were folded in, what the plan keeps is multiplied by those of the record, by code of its
own likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import axes_of, layer_name, names, split_layer, tensor_shape
from megatron_prune.model.blocks import EMBEDDING
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import dtype_word
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.sources.finite import is_finite, nonfinite_text
from megatron_prune.sources.folding_record import load_folding
from megatron_prune.sources.repair_record import Replaced, digest, load_repair
from megatron_prune.sources.source import Source
from megatron_prune.store.commit import MANIFEST, check_manifest

_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was compared.

    Attributes:
        folded: the axes whose gates were folded in, as plan files call them.
    """

    tensors: int
    values: int
    repaired: int
    folded: tuple[str, ...]
    files: int | None  # None: there was no manifest


def verify(
    pruned: Source, source: Source, plan: PrunePlan, progress: Callable[[int], object]
) -> Verdict:
    """Compare every tensor of ``pruned`` with the planned slice of ``source``.

    Args:
        progress: told the values of each tensor just compared.

    Raises:
        DamagedError: at the first difference; names the tensor, or the file where only the manifest
            tells.
    """
    if pruned.config.shape != plan.target:
        raise DamagedError(
            f"{pruned.path}: is {pruned.config.shape.as_dict()}, the plan makes "
            f"{plan.target.as_dict()}"
        )
    if pruned.plan_path is not None and load_plan(pruned.plan_path).digest != plan.digest:
        raise DamagedError(f"{pruned.plan_path}: was pruned with another plan than the one given")
    path = pruned.repair_path
    repaired = {} if path is None else load_repair(path, plan, pruned.config).tensors
    path, made = pruned.folding_path, "the planned slice of the source"
    folding = None if path is None else load_folding(path, plan, pruned.config)
    gates = {} if folding is None else folding.gates.by_axis
    if folding is not None:
        made += f" times the gates of {path}"
    tensors = values = 0
    for name in names(pruned.config):
        compared = 0
        if name in repaired:
            compared = _check_repaired(pruned, name, repaired[name], plan)
        factors = _Factors.of(name, pruned.config, gates)
        for at, found, wanted in () if name in repaired else _blocks(pruned, source, plan, name):
            _compare(pruned, name, at, found, factors.times(wanted, at), made)
            compared += found.numel()
        tensors, values = tensors + 1, values + compared
        progress(compared)
    return Verdict(
        tensors=tensors,
        values=values,
        repaired=len(repaired),
        folded=() if folding is None else folding.gates.words,
        files=check_files(pruned),
    )


def check_files(pruned: Source) -> int | None:
    """Hold every file of a checkpoint to its manifest; how many there are, None without one.

    Raises:
        DamagedError: with all differences.
    """
    if not (pruned.path / MANIFEST).is_file():
        return None
    if differences := check_manifest(pruned.path):
        raise DamagedError("; ".join(differences))
    return sum(1 for path in pruned.path.rglob("*") if path.is_file()) - 1


def _rows(plan: PrunePlan, axis: str, layer: int | None) -> list[int]:
    width = plan.source.kv_channels if axis in ("Q", "K") else 1
    return [i * width + j for i in plan.indices(axis, layer) for j in range(width)]


def _blocks(
    pruned: Source, source: Source, plan: PrunePlan, name: str
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Row blocks of a tensor: first row, what is there, what the plan says."""
    layer, rest = split_layer(name)
    old = None if layer is None else plan.layers[layer]
    whole = source.read(name if old is None else layer_name(old, rest))
    found = pruned.read(name)
    axes = axes_of(name)
    rows = torch.tensor(_rows(plan, axes[0], old))
    columns = torch.tensor(_rows(plan, axes[1], old)) if len(axes) > 1 else None
    for at in range(0, len(rows), _BLOCK_ROWS):
        wanted = whole.index_select(0, rows[at : at + _BLOCK_ROWS])
        if columns is not None:
            wanted = wanted.index_select(1, columns)
        yield at, found[at : at + _BLOCK_ROWS], wanted


@dataclass(frozen=True, kw_only=True, eq=False)
class _Factors:
    """What rows and columns of a tensor were multiplied by; None where by nothing.

    By axes: what writes into the hidden state has D for its rows, what scales it is a norm.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    @classmethod
    def of(cls, name: str, config: ModelConfig, gates: Mapping[str, Tensor]) -> _Factors:
        axes, shape = axes_of(name), config.shape
        layer, rest = split_layer(name)
        hidden = gates.get("D", torch.ones(shape.hidden_size))
        if not gates or (axes[0] != "D" and name != EMBEDDING.name):
            return cls()
        if name == EMBEDDING.name:
            return cls(columns=hidden)
        if layer is None:
            return cls(rows=None if config.tied else hidden)
        if rest.endswith("norm.weight"):
            return cls(rows=hidden)
        rows = hidden * gates.get("L", torch.ones(shape.num_layers))[layer]
        if axes == "D":
            return cls(rows=rows)

        def own(axis: str, unit: Tensor) -> Tensor:
            return gates[axis][layer][unit] if axis in gates else torch.ones(len(unit))

        unit = torch.arange(shape.size(axes[1], layer) * shape.rows(axes[1])) // shape.rows(axes[1])
        if axes[1] == "F":
            return cls(rows=rows, columns=own("F", unit))
        group = unit * shape.num_query_groups // shape.num_attention_heads
        return cls(rows=rows, columns=own("Q", unit) * own("K", group))

    def times(self, x: Tensor, at: int) -> Tensor:
        """Rows of the tensor from ``at`` on, multiplied in float32, rows first; in their dtype."""
        if self.rows is None and self.columns is None:
            return x
        product = x.float()
        if self.rows is not None:
            rows = self.rows[at : at + len(x)]
            product = product * (rows if x.ndim == 1 else rows.unsqueeze(1))
        if self.columns is not None:
            product = product * self.columns
        return product.to(x.dtype)


def _check_repaired(pruned: Source, name: str, replaced: Replaced, plan: PrunePlan) -> int:
    """Returns the values of the tensor."""
    found, stored = pruned.read(name), pruned.stored_name(name)
    if tuple(found.shape) != (wanted := tensor_shape(name, plan.target)):
        raise DamagedError(
            f"{pruned.path}: {stored}: is {tuple(found.shape)}, the plan makes {wanted}"
        )
    check_finite(pruned, name, found)
    if digest(found) != replaced.sha256.get(dtype_word(found.dtype)):
        raise DamagedError(
            f"{pruned.path}: {stored}: its SHA-256 is not the one {pruned.repair_path} has for "
            f"this tensor, replaced by {replaced.how}"
        )
    return found.numel()


def check_finite(pruned: Source, name: str, found: Tensor) -> None:
    """Raises DamagedError when a value is not finite; names the tensor."""
    if not is_finite(found):
        raise DamagedError(nonfinite_text(pruned, name))


def _compare(pruned: Source, name: str, at: int, found: Tensor, wanted: Tensor, made: str) -> None:
    stored = pruned.stored_name(name)
    if found.shape != wanted.shape:
        raise DamagedError(
            f"{pruned.path}: {stored}: is {tuple(found.shape)}, the plan makes "
            f"{tuple(wanted.shape)}"
        )
    check_finite(pruned, name, found)
    wanted = wanted.to(found.dtype)  # a checkpoint written with --dtype is compared in it
    if not torch.equal(found, wanted):
        place = (found != wanted).nonzero()[0].tolist()
        place[0] += at
        first = tuple(place)
        inside = (place[0] - at, *place[1:])
        raise DamagedError(
            f"{pruned.path}: {stored} at {first}: is {found[inside].item()!r}, {made} is "
            f"{wanted[inside].item()!r}"
        )
