"""An independent check of a sparse checkpoint against the model that it was made from.

Shares no code with what sets the zeros: it reads whole tensors of both, counts zeros itself, group
by group where a pattern was asked for, and compares every kept weight with the source's, or the
matrix with its SHA-256 in ``sparsity.json`` where the method changed what it kept. Everything that
the record does not name has to be the source's, bit by bit. Holds two tensors and a block of rows;
reads both checkpoints once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.families.config import hf_config
from megatron_prune.model.axes import axes_of, names, split_layer
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.tensors import dtype_word
from megatron_prune.sources.repair_record import digest
from megatron_prune.sources.source import SPARSITY, Source
from megatron_prune.sources.sparsity_record import SparseMatrix, Sparsity, parse_pattern
from megatron_prune.store.megatron import ITERATION
from megatron_prune.store.passenger import commands_of
from megatron_prune.verify import check_files, check_finite

_BLOCK_ROWS = 4096
_CONTRADICTS = 1e-6  # shares that two roundings of the same numbers cannot be apart


@dataclass(frozen=True, kw_only=True)
class SparseVerdict:
    """What was compared.

    Attributes:
        matrices: how many have zeros, ``hashed`` of them were held to their SHA-256.
        zeros, size: of these matrices.
        files: None: there was no manifest.
    """

    tensors: int
    values: int
    matrices: int
    hashed: int
    zeros: int
    size: int
    files: int | None


def verify_sparse(
    sparse: Source, source: Source, record: Sparsity, progress: Callable[[int], object]
) -> SparseVerdict:
    """Compare every tensor of ``sparse`` with that of ``source``, as the record says.

    Args:
        progress: told the values of each tensor just compared.

    Raises:
        ConfigError: ``source`` is another model than the record's, or ``sparse`` was trained since.
        DamagedError: at the first difference; names the tensor, or the file where only the manifest
            tells.
    """
    if record.source_digest != source.digest:
        raise ConfigError(
            f"--source {source.path}: its digest is {source.digest[:12]}..., {sparse.path} was "
            f"made sparse from {record.source_digest[:12]}... ({SPARSITY}); give the model that "
            "was sparsified"
        )
    _check_untrained(sparse, source, record)
    _check_configs(sparse, source)
    _check_named(sparse, record)
    tensors = values = zeros = recorded = size = 0
    for name in names(sparse.config):
        found = sparse.read(name)
        if name in record.tensors:
            matrix = record.tensors[name]
            zeros += _check_matrix(sparse, source, name, matrix)
            recorded += round(matrix.reached * found.numel())
            size += found.numel()
        else:
            _check_same(sparse, source, name)
        tensors, values = tensors + 1, values + found.numel()
        progress(found.numel())
    if size and abs(record.reached - recorded / size) > _CONTRADICTS:
        raise DamagedError(
            f"{sparse.sparsity_path}: reached is {record.reached}, its matrices come to "
            f"{recorded / size}"
        )
    hashed = sum(matrix.sha256 is not None for matrix in record.tensors.values())
    return SparseVerdict(
        tensors=tensors,
        values=values,
        matrices=len(record.tensors),
        hashed=hashed,
        zeros=zeros,
        size=size,
        files=check_files(sparse),
    )


def _check_untrained(sparse: Source, source: Source, record: Sparsity) -> None:
    """Refuse what was trained since, with what is left of its zeros; that is no damage."""
    known = set(commands_of(source))
    is_trained = any(line not in known for line in commands_of(sparse))
    if not (is_trained or sparse.has_optimizer_state or sparse.iteration > ITERATION):
        return
    _check_named(sparse, record)
    recorded = found = broken = 0
    for name, matrix in record.tensors.items():
        is_zero = sparse.read(name) == 0
        recorded += round(matrix.reached * is_zero.numel())
        found += int(is_zero.sum())
        broken += _broken_group(is_zero, matrix.pattern) is not None
    patterns = sum(matrix.pattern is not None for matrix in record.tensors.values())
    kept = f"; the pattern holds in {patterns - broken} of {patterns} matrices" if patterns else ""
    raise ConfigError(
        f"{sparse.path}: was trained since it was made sparse, and training changed its weights: "
        f"they are no longer those of {source.path}. Of its sparse matrices {found:,} weights are "
        f"zero, {recorded:,} were{kept}. To prove a sparse model, verify the checkpoint that this "
        "training began with"
    )


def _check_configs(sparse: Source, source: Source) -> None:
    def values(of: Source) -> dict[str, Any]:
        found = hf_config(replace(of.config, dtype=source.config.dtype))
        told: dict[str, Any] = json.loads(json.dumps(found))
        return {key: x for key, x in told.items() if key not in ("dtype", "torch_dtype")}

    found, wanted = values(sparse), values(source)
    for key in sorted({*found, *wanted}):
        if found.get(key) != wanted.get(key):
            raise DamagedError(
                f"{sparse.path}: its configuration says {key} {found.get(key)!r:.60}, the "
                f"source's {wanted.get(key)!r:.60}; zeros change no configuration"
            )


def _check_named(sparse: Source, record: Sparsity) -> None:
    """Refuse a record of what is no linear of a layer."""
    linears = {
        name
        for name in names(sparse.config)
        if split_layer(name)[0] is not None and len(axes_of(name)) == 2
    }
    if claimed := next((name for name in record.tensors if name not in linears), None):
        raise DamagedError(
            f"{sparse.sparsity_path}: claims {claimed:.80}, which is no linear of its layers"
        )


def _blocks(
    sparse: Source, source: Source, name: str
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Row blocks of a tensor: first row, what is there, the source's, and that in the dtype of what
    is there."""
    found, wanted = sparse.read(name), source.read(name)
    if found.shape != wanted.shape:
        raise DamagedError(
            f"{sparse.path}: {sparse.stored_name(name)}: is {tuple(found.shape)}, the source's is "
            f"{tuple(wanted.shape)}"
        )
    check_finite(sparse, name, found)
    for at in range(0, len(found), _BLOCK_ROWS):
        rows = wanted[at : at + _BLOCK_ROWS]
        yield at, found[at : at + _BLOCK_ROWS], rows, rows.to(found.dtype)


def _check_same(sparse: Source, source: Source, name: str) -> None:
    for at, found, _, wanted in _blocks(sparse, source, name):
        bits = getattr(torch, f"int{8 * found.dtype.itemsize}")
        if place := _first(found.view(bits) != wanted.view(bits)):
            raise DamagedError(
                f"{_where(sparse, name, place, at)}: is {found[place].item()!r}, the source's is "
                f"{wanted[place].item()!r}; {SPARSITY} does not name this tensor"
            )


def _check_matrix(sparse: Source, source: Source, name: str, matrix: SparseMatrix) -> int:
    """Returns the zeros of the matrix."""
    zeros = narrowed = 0
    for at, found, original, wanted in _blocks(sparse, source, name):
        is_zero = found == 0
        zeros += int(is_zero.sum())
        narrowed += int(((original != 0) & (wanted == 0)).sum())
        revived = ~is_zero & (original == 0)
        changed = revived if matrix.sha256 is not None else ~is_zero & (found != wanted)
        if place := _first(changed):
            raise DamagedError(
                f"{_where(sparse, name, place, at)}: is {found[place].item()!r}, the source's is "
                f"{wanted[place].item()!r}; "
                + ("zeros stay" if revived[place] else "a kept weight is the source's")
            )
        if broken := _broken_group(is_zero, matrix.pattern):
            row, first, last, count = broken
            raise DamagedError(
                f"{sparse.path}: {sparse.stored_name(name)} at ({at + row}, {first}) to "
                f"({at + row}, {last}): {count} of {last - first + 1} weights are zero; the "
                f"pattern is {matrix.pattern}"
            )
    _check_count(sparse, source, name, matrix, zeros, narrowed)
    if matrix.sha256 is not None:
        _check_hash(sparse, name, matrix)
    return zeros


def _first(is_wrong: Tensor) -> tuple[int, ...] | None:
    return tuple(is_wrong.nonzero()[0].tolist()) if bool(is_wrong.any()) else None


def _where(sparse: Source, name: str, place: tuple[int, ...], at: int) -> str:
    return f"{sparse.path}: {sparse.stored_name(name)} at {(place[0] + at, *place[1:])}"


def _broken_group(is_zero_OI: Tensor, pattern: str | None) -> tuple[int, int, int, int] | None:
    """The first group of M consecutive inputs of a row with fewer than M - N zeros: row, first and
    last input, and how many zeros it has. A last group that is cut short is one too."""
    if pattern is None:
        return None
    wanted = parse_pattern(pattern)
    group, width = wanted.group, is_zero_OI.shape[1]
    padded = torch.nn.functional.pad(is_zero_OI, (0, -width % group))
    counts = padded.unflatten(1, (-1, group)).sum(2)
    if (place := _first(counts < group - wanted.keep)) is None:
        return None
    row, number = place
    first = number * group
    return row, first, min(first + group, width) - 1, int(counts[place])


def _check_count(
    sparse: Source, source: Source, name: str, matrix: SparseMatrix, zeros: int, narrowed: int
) -> None:
    """A narrower dtype than the source's can only add zeros: weights too small for it."""
    size = sparse.read(name).numel()
    recorded = round(matrix.reached * size)
    is_cast = sparse.dtype(name) != source.dtype(name)
    more = 0 if not is_cast else narrowed if matrix.sha256 is None else size
    if not recorded <= zeros <= recorded + more:
        raise DamagedError(
            f"{sparse.path}: {sparse.stored_name(name)}: {zeros:,} of {size:,} weights are zero, "
            f"{SPARSITY} says {recorded:,}"
        )


def _check_hash(sparse: Source, name: str, matrix: SparseMatrix) -> None:
    found = sparse.read(name)
    assert matrix.sha256 is not None
    if digest(found) != matrix.sha256.get(dtype_word(found.dtype)):
        raise DamagedError(
            f"{sparse.path}: {sparse.stored_name(name)}: its SHA-256 is not the one {SPARSITY} has "
            f"for it in {dtype_word(found.dtype)}"
        )
