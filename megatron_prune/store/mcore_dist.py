"""Megatron's distributed format (``--ckpt-format torch_dist``), read and written without Megatron.

A directory of torch's distributed checkpoint: ``.metadata`` (pickled index), ``__R_0.distcp``
(chunks, each a small ``torch.save`` archive), ``common.pt`` (arguments), ``metadata.json``. Layers
are stacked: ``decoder.layers.mlp.linear_fc1.weight`` is ``[L, 2F, D]``. Reading maps the files and
takes views of the chunks' bytes; writing holds one chunk.
"""

from __future__ import annotations

import io
import json
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.files import HashedFile, write_file
from megatron_prune.model.axes import (
    LAYER_PREFIX,
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
    Piece,
    megatron_name,
    piece,
    stored_shape,
)
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelConfig
from megatron_prune.sources.source import Source, assemble
from megatron_prune.store.dist_chunks import ChunkFiles
from megatron_prune.store.dist_index import INDEX, Chunk, Index, read_index
from megatron_prune.store.dist_records import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
    dump_records,
)
from megatron_prune.store.megatron import (
    Atom,
    atoms,
    by_stage,
    check_names,
    is_of_the_model,
    refuse_own_head,
    stored_layer,
)
from megatron_prune.store.training import COMMON, SavedRun
from megatron_prune.store.writer import Progress, Writer, Written, ahead

__all__ = ["COMMON", "FORMAT", "INDEX", "DistSource", "DistWriter", "read_index"]

FORMAT = "metadata.json"
_FORMAT_FACTS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class DistSource(Source):
    """A torch_dist checkpoint, ours or stock Megatron's, at any TP and PP."""

    format = "torch_dist"

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        grid: ParallelGrid,
        index: Index,
        *,
        companion_files: dict[str, Path],
        plan_path: Path | None,
        iteration: int,
    ) -> None:
        self.path, self.config, self.grid = directory, config, grid
        self.companion_files, self.plan_path = companion_files, plan_path
        self.iteration = iteration
        self.has_optimizer_state, self._chunks = index.has_optimizer_state, index.tensors
        self._stacks = any(k.startswith(LAYER_PREFIX) and stored_layer(k) < 0 for k in self._chunks)
        wanted = {self._place(name)[0] for name in names(config)}
        if config.tied and OUTPUT.name in self._chunks:
            refuse_own_head(directory / INDEX, f"yet it has {OUTPUT.name}")
        if self._chunks and not any(map(is_of_the_model, self._chunks)):
            raise CheckpointError(
                f"{directory / INDEX}: holds {next(iter(self._chunks))} and others; wanted the "
                "names of a GPT model of Megatron-Core (decoder.layers...). Export it with what "
                "wrote it"
            )
        check_names(directory / INDEX, wanted, self._chunks)
        self._files = ChunkFiles(directory, index)
        self._check_shapes()

    def _place(self, name: str) -> tuple[str, bool]:
        """The key of a stored tensor, and whether it is stacked over layers."""
        layer, rest = split_layer(name)
        stored = megatron_name(rest, te_norms=True)
        stacked, alone = f"decoder.layers.{stored}", in_layer(layer, stored)
        if layer is None or alone in self._chunks or not self._stacks:
            return alone, False
        return stacked, True

    def _stored(self, name: str) -> tuple[list[Chunk], int | None, tuple[int, ...]]:
        """Chunks of the stored tensor, the layer within it (stacked keys), its shape."""
        layer = split_layer(name)[0]
        key, is_stacked = self._place(name)
        whole, chunks = self._chunks[key]
        if not is_stacked or layer is None:
            return chunks, None, whole
        mine = [c for c in chunks if c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        return mine, layer, whole[1:]

    def _check_shapes(self) -> None:
        shape = self.config.shape
        for key, is_stacked in map(self._place, names(self.config)):
            if is_stacked and self._chunks[key][0][0] != shape.num_layers:
                raise DamagedError(
                    f"{self.path}: {key} holds {self._chunks[key][0][0]} layers, its configuration "
                    f"says {shape.num_layers}"
                )
        for name in names(self.config):
            *_, stored = self._stored(name)
            wanted = stored_shape(split_layer(name)[1], tensor_shape(name, shape), shape)
            if axes_of(name)[0] == "V" and stored[0] >= wanted[0]:
                wanted = (stored[0], *wanted[1:])  # padded rows
            if stored != wanted:
                raise DamagedError(
                    f"{self.path}: {name}: stored as {stored}, its configuration says {wanted}"
                )

    @property
    def stored_vocab_size(self) -> int:
        return self._stored(EMBEDDING.name)[2][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name)[0][0].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        axes = axes_of(name)
        dim = split_dim(axes)
        chunks, layer, _ = self._stored(name)
        if dim is None:
            if not chunks:
                raise DamagedError(f"{self.path / INDEX}: {name} has no chunk")
            return self._within(chunks[0], layer)
        stop = self.config.shape.size(axes[dim]) if stop is None else stop
        pieces = [p for c in chunks if (p := self._piece(c, layer, name, dim)) is not None]
        return assemble(name, pieces, start, stop, self.path)

    def _within(self, chunk: Chunk, layer: int | None) -> Tensor:
        x = self._files.view(chunk)
        return x if layer is None else x[layer - chunk.offsets[0]]

    def _piece(self, chunk: Chunk, layer: int | None, name: str, dim: int) -> Piece | None:
        axes, rest = axes_of(name), split_layer(name)[1]
        lead = 0 if layer is None else 1
        if any(chunk.offsets[lead + d] for d in range(len(axes)) if d != dim):
            raise CheckpointError(
                f"{self.path}: {axes} is cut along a dim that tensor parallelism does not cut"
            )
        begin, count = chunk.offsets[dim + lead], chunk.sizes[dim + lead]
        try:
            return piece(lambda: self._within(chunk, layer), rest, begin, count, self.config.shape)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {error}, at row {begin}") from None

    def close(self) -> None:
        super().close()
        self._files.close()


class DistWriter(Writer):
    """Writes ``__R_0.distcp`` per model-parallel rank of the target, then the index over them.

    The chunk grid is the target's TP grid, so readers at that TP fetch whole chunks. What a run
    left beside its model keeps its chunks, in files of its own: one for each that it lies in.
    """

    def __init__(
        self, source: Source, grid: ParallelGrid, args: Namespace, run: SavedRun | None = None
    ) -> None:
        self._source, self._grid, self._run = source, grid, run
        self._ranks = {f"__{number}_0.distcp": rank for number, rank in enumerate(grid.ranks())}
        beside = [] if run is None else run.chunks
        self._beside = {f"__{number}_1.distcp": file for number, file in enumerate(beside)}
        self.stages = [*by_stage(self._ranks), *([file] for file in self._beside)]
        self.total_bytes = sum(a.bytes for rank in self._ranks.values() for a in self._atoms(*rank))
        self.total_bytes += 0 if run is None else run.bytes
        common = io.BytesIO()
        more = {} if run is None else run.common
        torch.save(
            {"args": args, "checkpoint_version": 3.0, "iteration": args.iteration, **more}, common
        )
        self._common = common.getvalue()

    def _atoms(self, tp_rank: int, pp_rank: int) -> Any:
        return atoms(self._source, self._grid, tp_rank, pp_rank, te_norms=True, shared=True)

    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Generator[None, None, Written]:
        directory.mkdir(parents=True, exist_ok=True)
        out = HashedFile.create(directory / file, pool)
        if file in self._beside:
            entries = yield from self._copy(file, out, progress)
            return Written(out.close(), entries)
        entries = []
        parts, last = list(self._atoms(*self._ranks[file])), None
        for atom, data in zip(parts, ahead((atom.pull for atom in parts), pool), strict=True):
            if atom.layer != last:
                yield
                last = atom.layer
            offset = out.position
            shape = atom.shape if atom.layer is None else (1, *atom.shape)
            _save(torch.frombuffer(data, dtype=atom.dtype).view(shape), out)
            entries.append((atom_key(atom), _stacked(atom, self._layers), offset, out.position))
            progress(atom.bytes)
        if self._ranks[file] == (0, 0):
            entries += self._extra_states(out)
        return Written(out.close(), entries)

    def _copy(
        self, file: str, out: HashedFile, progress: Progress
    ) -> Generator[None, None, list[Any]]:
        """The chunks beside the model's, as they are."""
        assert self._run is not None
        entries = []
        for key, whole, chunk in self._run.chunks[self._beside[file]]:
            yield
            offset, values = out.position, self._run.files.view(chunk)
            _save(values, out)
            place = (chunk.dtype, whole, chunk.offsets, chunk.sizes)
            entries.append((key, place, offset, out.position))
            progress(values.nbytes)
        return entries

    @property
    def _layers(self) -> int:
        return self._source.config.shape.num_layers

    def _extra_states(self, out: HashedFile) -> list[Any]:
        entries = []
        empty = io.BytesIO()
        torch.save([None], empty)
        for module in (*LINEARS, TE_ATTENTION):
            for layer in range(self._layers):
                offset = out.position
                out.write(empty.getbuffer())
                key = f"decoder.layers.{module}._extra_state/shard_{layer}_{self._layers}"
                entries.append((key, None, offset, out.position))
        return entries

    def finish(self, directory: Path, written: Mapping[str, Written]) -> None:
        places: dict[MetadataIndex, StorageInfo] = {}
        tensors: dict[str, list[Any]] = defaultdict(list)
        keys: dict[str, Any] = {}
        for file in self.files:
            for key, place, start, stop in written[file].payload:
                key = sys.intern(key)  # equal strings pickle alike only when they are one object
                info = StorageInfo(relative_path=file, offset=start, length=stop - start)
                if place is None:
                    keys[key] = BytesStorageMetadata()
                    places[MetadataIndex(fqn=key, index=None)] = info
                    continue
                dtype, whole, offsets, sizes = place
                chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
                tensors[key].append((dtype, whole, chunk))
                at = MetadataIndex(fqn=key, index=None, offset=torch.Size(offsets))
                places[at] = info
        for key, chunks in tensors.items():
            dtype, whole, _ = chunks[0]
            parts = sorted((c for _, _, c in chunks), key=lambda c: tuple(c.offsets))
            keys[key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=dtype), size=torch.Size(whole), chunks=parts
            )
        order = sorted(places, key=lambda i: (i.fqn, tuple(i.offset or ())))
        index = Metadata(
            state_dict_metadata=dict(sorted(keys.items())),
            planner_data=None,
            storage_data={place: places[place] for place in order},
            storage_meta=StorageMeta(checkpoint_id=None, save_id=None, load_id=None, modules=[]),
            version="1.0.0",
        )
        write_file(directory / INDEX, dump_records(index))
        write_file(directory / COMMON, self._common)
        write_file(directory / FORMAT, json.dumps(_FORMAT_FACTS).encode())


def _save(x: Tensor, out: HashedFile) -> None:
    """``torch.save`` without its CRC-32: the manifest's SHA-256 covers every byte."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(x, cast(Any, out))
    except RuntimeError as error:
        if out.failure is None:
            raise
        raise out.failure from error  # what torch.save found when the disk was full
    finally:
        torch.serialization.set_crc32_options(True)


def atom_key(atom: Atom) -> str:
    """The stacked key of an atom."""
    return atom.name if atom.layer is None else f"decoder.layers.{atom.name}"


def _stacked(atom: Atom, layers: int) -> tuple[torch.dtype, tuple[int, ...], Any, Any]:
    """Dtype, whole shape, offset and size of an atom under its stacked key."""
    if atom.layer is None:
        return atom.dtype, atom.global_shape, atom.global_offset, atom.shape
    return (
        atom.dtype,
        (layers, *atom.global_shape),
        (atom.layer, *atom.global_offset),
        (1, *atom.shape),
    )
