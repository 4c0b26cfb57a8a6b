"""Sparse models and their records: zeros by sizes, hashes by hashlib, no code of any method.

What writes them is the package's own way out, `SparseSource` and `write_checkpoint`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.model.axes import axes_of, names, split_layer
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.tensors import DTYPES
from megatron_prune.ranks import Ranks
from megatron_prune.sources.replaced import Tensors
from megatron_prune.sources.source import Source
from megatron_prune.sources.sparse import SparseSource
from megatron_prune.sources.sparsity_record import SparseMatrix, Sparsity
from megatron_prune.store import open_source
from megatron_prune.surgery import Target, write_checkpoint

ALONE = Ranks(rank=0, world_size=1)


def smallest_out(weight_OI: Tensor, keep: int, group: int) -> Tensor:
    """Of every ``group`` consecutive inputs the ``keep`` largest; the lower index among equals."""
    rows = weight_OI.float().abs().reshape(len(weight_OI), -1, group)
    order = torch.sort(rows, dim=2, descending=True, stable=True).indices[..., keep:]
    return weight_OI.where(
        torch.ones_like(rows, dtype=torch.bool).scatter(2, order, False).view_as(weight_OI), 0
    )


def hashes(x: Tensor) -> dict[str, str]:
    return {
        word: hashlib.sha256(
            x.to(getattr(torch, name)).contiguous().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        for word, name in DTYPES.items()
    }


def linears(source: Source) -> list[str]:
    """Of all layers."""
    return [
        n for n in names(source.config) if split_layer(n)[0] is not None and len(axes_of(n)) == 2
    ]


def make_sparse(
    load: Path,
    save: Path,
    *,
    pattern: str | None = "2:4",
    changes_kept: bool = False,
    wanted: Callable[[str], bool] = lambda name: True,
    format: str = "hf",
    grid: ParallelGrid | None = None,
    method: str = "wanda",
) -> Sparsity:
    """Write ``load`` with half of its linears' weights zero.

    Args:
        pattern: None for half of each row.
        changes_kept: make what stays larger by half, and record hashes.
        wanted: names of the linears.
    """
    source = open_source(load)
    scratch = save.with_name(f"{save.name}-scratch")
    scratch.mkdir()
    replaced, matrices, zeros, size = Tensors(scratch), {}, 0, 0
    for number, name in enumerate(filter(wanted, linears(source))):
        x = source.read(name)
        group = 4 if pattern else x.shape[1]
        x = smallest_out(x, group // 2, group) * (1.5 if changes_kept else 1.0)
        replaced.put(name, x)
        count = int((x == 0).sum())
        zeros, size = zeros + count, size + x.numel()
        matrices[name] = SparseMatrix(
            asked=0.5, pattern=pattern, reached=count / x.numel(),
            energy=0.9 - 0.01 * (number % 7), error=0.1,
            sha256=hashes(x) if changes_kept else None,
        )  # fmt: skip
    record = Sparsity(
        method=method, sparsity=0.5, pattern=pattern, reached=zeros / size,
        settings={"tokens": 1024, "weight_update": "none"},
        source_digest=source.digest, tensors=matrices,
    )  # fmt: skip
    (scratch / "new.json").write_text(record.to_json())
    target = Target(directory=save, format=format, grid=grid or ParallelGrid())
    write_checkpoint(SparseSource(source, replaced, scratch / "new.json"), target, ranks=ALONE)
    source.close()
    return record


def edit_record(path: Path, **changes: Any) -> None:
    """Change values of a record."""
    import json

    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))
