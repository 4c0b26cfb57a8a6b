"""Megatron's legacy format (``--ckpt-format torch``): ``mp_rank_TT[_PPP]/model_optim_rng.pt``.

Reading maps the files into memory; a tensor is read when it is used. Writing has torch lay out each
file without its values first (`torch.serialization.skip_data`: holes, no bytes on disk), then
streams that layout with the values in their places: one pass, and private memory stays at a few
blocks whatever the file's size.
"""

from __future__ import annotations

import mmap
import re
from argparse import Namespace
from collections import defaultdict
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from megatron_prune.errors import CheckpointError, DamagedError, StorageError
from megatron_prune.files import HashedFile
from megatron_prune.model.axes import (
    axes_of,
    in_layer,
    names,
    split_dim,
    split_layer,
    tensor_shape,
)
from megatron_prune.model.blocks import EMBEDDING, OUTPUT
from megatron_prune.model.fusion import (
    LINEARS,
    TE_ATTENTION,
    TE_NORMS,
    Piece,
    fused_of,
    group_piece,
    plain_piece,
    split,
    stored_name,
    stored_shape,
)
from megatron_prune.model.grid import ParallelGrid, part_range
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelConfig
from megatron_prune.sources.source import Source, assemble
from megatron_prune.store.chunk import record_places
from megatron_prune.store.megatron import (
    ITERATION,
    atoms,
    by_stage,
    check_names,
    refuse_own_head,
    stored_layer,
)
from megatron_prune.store.untrusted import load_untrusted, plain_values
from megatron_prune.store.writer import Progress, Writer, Written, ahead

FILE = "model_optim_rng.pt"


def rank_directory(tp_rank: int, pp_rank: int, pipeline_parallel: int) -> str:
    """``mp_rank_TT``, with ``_PPP`` when there are stages."""
    stage = f"_{pp_rank:03d}" if pipeline_parallel > 1 else ""
    return f"mp_rank_{tp_rank:02d}{stage}"


def find_grid(directory: Path) -> ParallelGrid:
    """The layout of an iteration directory, from the names of its rank directories.

    Raises:
        CheckpointError: there are none.
        DamagedError: one is missing; names it.
    """
    found = set()
    for path in directory.glob("mp_rank_*"):
        if match := re.fullmatch(r"mp_rank_(\d{2,})(?:_(\d{3,}))?", path.name):
            found.add((int(match[1]), int(match[2] or 0), match[2] is not None))
    if not found:
        raise CheckpointError(f"{directory}: no mp_rank_* directories; not a legacy checkpoint")
    tp = 1 + max(tp for tp, _, _ in found)
    pp = 1 + max(pp for _, pp, _ in found)
    if any(staged for *_, staged in found):
        pp = max(pp, 2)
    check_ranks(directory, tp, pp)
    return ParallelGrid(tensor_parallel=tp, pipeline_parallel=pp)


def check_ranks(directory: Path, tp: int, pp: int) -> None:
    """Refuse a directory that lacks the file of a rank.

    Raises:
        DamagedError: names the first one that is missing.
    """
    for tp_rank in range(tp):
        for pp_rank in range(pp):
            name = rank_directory(tp_rank, pp_rank, pp)
            if not (directory / name / FILE).is_file():
                raise DamagedError(
                    f"{directory}: {tp} x {pp} tensor x pipeline shards, {name}/{FILE} is missing; "
                    "copy it, or convert again from the source"
                )


class LegacySource(Source):
    """A legacy checkpoint at any TP and PP, written from either layer spec."""

    format = "torch"

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        grid: ParallelGrid,
        *,
        companion_files: dict[str, Path],
        plan_path: Path | None,
        iteration: int,
    ) -> None:
        self.path, self.config, self.grid = directory, config, grid
        self.companion_files, self.plan_path = companion_files, plan_path
        self.iteration = iteration
        self._file = cache(self._open)
        stages = [self._stage_layers(pp_rank) for pp_rank in range(grid.pipeline_parallel)]
        if sum(stages) != config.shape.num_layers:
            raise DamagedError(
                f"{directory}: stages hold {stages} layers, the model has {config.shape.num_layers}"
            )
        self._layer_place = [(p, i) for p, count in enumerate(stages) for i in range(count)]
        self._check_names()
        self._check_shapes()

    def rank_path(self, tp_rank: int, pp_rank: int) -> Path:
        return self.path / rank_directory(tp_rank, pp_rank, self.grid.pipeline_parallel) / FILE

    def _open(self, tp_rank: int, pp_rank: int) -> dict[str, Any]:
        path = self.rank_path(tp_rank, pp_rank)
        state = load_untrusted(path, mmap=True)
        model = state.get("model") if isinstance(state, dict) else None
        if isinstance(state, dict) and "model0" in state:
            raise CheckpointError(
                f"{path}: model0, model1, ...: an interleaved pipeline, which is not read; load "
                "and save it without virtual pipeline stages, or in torch_dist"
            )
        if not isinstance(model, dict) or not all(isinstance(key, str) for key in model):
            raise DamagedError(f"{path}: holds no model; wanted one of Megatron under 'model'")
        self.has_optimizer_state = "optimizer" in state
        tensors = {key: x for key, x in model.items() if isinstance(x, torch.Tensor)}
        return {**model, **plain_values(tensors, path)}

    def _stage_layers(self, pp_rank: int) -> int:
        return 1 + max((stored_layer(key) for key in self._file(0, pp_rank)), default=-1)

    def _place(self, name: str, tp_rank: int) -> tuple[int, str]:
        """Where part of ``name`` is stored: the stage, and the key in its file."""
        layer, rest = split_layer(name)
        if layer is None:
            pp_rank = 0 if rest.startswith("embedding") else self.grid.pipeline_parallel - 1
            local = None
        else:
            pp_rank, local = self._layer_place[layer]
        key = in_layer(local, stored_name(rest))
        if rest in TE_NORMS and key not in self._file(tp_rank, pp_rank):
            key = in_layer(local, TE_NORMS[rest])
        return pp_rank, key

    def _stored(self, name: str, tp_rank: int) -> Tensor:
        """The rank's stored tensor that holds part of ``name``."""
        pp_rank, key = self._place(name, tp_rank)
        stored: Tensor = self._file(tp_rank, pp_rank)[key]
        return stored

    def _check_names(self) -> None:
        for tp_rank in range(self.grid.tensor_parallel):
            wanted = defaultdict(set)
            for name in names(self.config):
                pp_rank, key = self._place(name, tp_rank)
                wanted[pp_rank].add(key)
            for pp_rank in range(self.grid.pipeline_parallel):
                model = self._file(tp_rank, pp_rank)
                held = {key for key, x in model.items() if isinstance(x, torch.Tensor)}
                if self.config.tied and OUTPUT.name in held:
                    self._check_copy(tp_rank, model[OUTPUT.name])
                    held.discard(OUTPUT.name)
                check_names(self.rank_path(tp_rank, pp_rank), wanted[pp_rank], held)

    def _check_copy(self, tp_rank: int, copy: Tensor) -> None:
        """Of the embedding, on the last stage of a tied model: every value is the same."""
        if not torch.equal(copy, self._stored(EMBEDDING.name, tp_rank)):
            where = self.rank_path(tp_rank, self.grid.pipeline_parallel - 1)
            refuse_own_head(where, f"yet {OUTPUT.name} has values of its own")

    def _check_shapes(self) -> None:
        for name in names(self.config):
            for tp_rank in range(self.grid.tensor_parallel):
                x = self._stored(name, tp_rank)
                wanted = self._stored_shape(name)
                if tuple(x.shape) != wanted:
                    raise DamagedError(
                        f"{self.path}: {name}: tp_rank {tp_rank} stores {tuple(x.shape)}, "
                        f"its configuration says {wanted}"
                    )

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        shape, axes = self.config.shape, axes_of(name)
        sizes = list(stored_shape(split_layer(name)[1], tensor_shape(name, shape), shape))
        dim = split_dim(axes)
        if dim is None:
            return tuple(sizes)
        if axes[dim] == "V":
            sizes[0] = self._padded_rows(name)
        sizes[dim] //= self.grid.tensor_parallel
        return tuple(sizes)

    def _padded_rows(self, name: str) -> int:
        """Vocabulary rows of all ranks: as padded by whatever divisor and layout came before."""
        parts = self.grid.tensor_parallel
        first, wanted = self._stored(name, 0), -(-self.config.shape.vocab_size // parts)
        return parts * max(wanted, first.shape[0] if first.dim() else 0)

    @property
    def stored_vocab_size(self) -> int:
        return self._padded_rows(EMBEDDING.name)

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name, 0).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        axes = axes_of(name)
        dim = split_dim(axes)
        if dim is None:
            return self._stored(name, 0)
        stop = self.config.shape.size(axes[dim]) if stop is None else stop
        pieces = [self._piece(name, rank) for rank in range(self.grid.tensor_parallel)]
        return assemble(name, pieces, start, stop, self.path)

    def _piece(self, name: str, tp_rank: int) -> Piece:
        shape, parts = self.config.shape, self.grid.tensor_parallel
        axes = axes_of(name)
        dim = split_dim(axes)
        assert dim is not None
        x, rest = self._stored(name, tp_rank), split_layer(name)[1]
        fused = fused_of(rest)
        if fused is not None and fused.by_group:
            first, last = part_range(shape.num_query_groups, tp_rank, parts)
            return group_piece(lambda: x, rest, first, last - first, shape)
        x = split(x, rest, shape)
        axis = axes[dim]
        size = self._padded_rows(name) if axis == "V" else shape.size(axis)
        start, stop = part_range(size, tp_rank, parts)
        return plain_piece(lambda: x, start, stop, dim=dim, rows=shape.rows(axis))

    def close(self) -> None:
        super().close()
        self._file.cache_clear()


class LegacyWriter(Writer):
    """Writes ``mp_rank_*`` directories; one file per model-parallel rank."""

    def __init__(
        self, source: Source, grid: ParallelGrid, args: Namespace, *, te_norms: bool
    ) -> None:
        self._source, self._grid, self._te_norms = source, grid, te_norms
        self._common = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
        self._ranks = {
            f"{rank_directory(tp, pp, grid.pipeline_parallel)}/{FILE}": (tp, pp)
            for tp, pp in grid.ranks()
        }
        self.stages = by_stage(self._ranks)
        self.total_bytes = sum(a.bytes for rank in self._ranks.values() for a in self._atoms(*rank))

    def _atoms(self, tp_rank: int, pp_rank: int) -> Any:
        return atoms(
            self._source, self._grid, tp_rank, pp_rank, te_norms=self._te_norms, shared=False
        )

    def _layout(self, tp_rank: int, pp_rank: int) -> dict[str, Tensor | None]:
        """Every key of the rank's file, in order; the tensors reserve addresses, not memory."""
        first = self._grid.stage_layers(self._source.config.shape.num_layers, pp_rank).start
        model: dict[str, Tensor | None] = {}
        for atom in self._atoms(tp_rank, pp_rank):
            layer = None if atom.layer is None else atom.layer - first
            key = in_layer(layer, atom.name)
            if key in model:
                continue
            model[key] = torch.empty(atom.local_shape, dtype=atom.dtype)
            module, _, kind = atom.name.rpartition(".")
            if kind == "weight" and module in (*LINEARS, "output_layer"):
                model[in_layer(layer, f"{module}._extra_state")] = None
            if self._te_norms and module == LINEARS[0]:
                model[in_layer(layer, f"{TE_ATTENTION}._extra_state")] = None
        return model

    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Generator[None, None, Written]:
        tp_rank, pp_rank = self._ranks[file]
        path = directory / file
        path.parent.mkdir(parents=True)
        layout = path.with_suffix(".layout")
        model = self._layout(tp_rank, pp_rank)
        try:
            with torch.serialization.skip_data():
                torch.save({**self._common, "model": model}, layout)
        except RuntimeError as error:  # torch's own writer has no errno
            raise StorageError(f"{path}: cannot be written ({error}); is the disk full?") from error
        with open(layout, "rb") as file_of_holes:
            holes = mmap.mmap(file_of_holes.fileno(), 0, access=mmap.ACCESS_READ)
        layout.unlink()
        place = record_places(holes, 0, len(holes))
        stored = (key for key, x in model.items() if x is not None)
        begin = {key: place(f"data/{number}")[0] for number, key in enumerate(stored)}
        first = self._grid.stage_layers(self._source.config.shape.num_layers, pp_rank).start
        out = HashedFile.create(path, pool)
        parts, last = list(self._atoms(tp_rank, pp_rank)), None
        for atom, data in zip(parts, ahead((atom.pull for atom in parts), pool), strict=True):
            if atom.layer != last:
                yield
                last = atom.layer
            layer = None if atom.layer is None else atom.layer - first
            out.write(holes[out.position : begin[in_layer(layer, atom.name)]])  # headers, padding
            out.write(data)
            progress(atom.bytes)
        out.write(holes[out.position :])
        return Written(out.close())

    def finish(self, directory: Path, written: Mapping[str, Written]) -> None:
        """Every file stands alone."""
