"""An independent check of a pruned checkpoint: plain indexing by the plan's own numbers.

Shares no slicing code with `surgery`: it reads whole tensors of the source, expands the plan's
indices itself, and compares every value. Holds a few blocks of rows; reads both checkpoints once.
Tensors that a repair replaced are held to the SHA-256 in its record, which is in the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import axes_of, layer_name, names, split_layer, tensor_shape
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.tensors import dtype_word
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.sources.finite import is_finite, nonfinite_text
from megatron_prune.sources.repair_record import Replaced, digest, load_repair
from megatron_prune.sources.source import Source
from megatron_prune.store.commit import MANIFEST, check_manifest

_BLOCK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was compared."""

    tensors: int
    values: int
    repaired: int
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
    tensors = values = 0
    for name in names(pruned.config):
        compared = 0
        if name in repaired:
            compared = _check_repaired(pruned, name, repaired[name], plan)
        for at, found, wanted in () if name in repaired else _blocks(pruned, source, plan, name):
            _compare(pruned, name, at, found, wanted)
            compared += found.numel()
        tensors, values = tensors + 1, values + compared
        progress(compared)
    files = check_files(pruned)
    return Verdict(tensors=tensors, values=values, repaired=len(repaired), files=files)


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


def _compare(pruned: Source, name: str, at: int, found: Tensor, wanted: Tensor) -> None:
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
            f"{pruned.path}: {stored} at {first}: is {found[inside].item()!r}, the planned slice "
            f"of the source is {wanted[inside].item()!r}"
        )
