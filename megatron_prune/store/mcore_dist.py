"""Megatron's distributed format (``--ckpt-format torch_dist``), read and written without Megatron.

A directory of torch's distributed checkpoint: ``.metadata`` (pickled index), ``__R_0.distcp``
(chunks, each a small ``torch.save`` archive), ``common.pt`` (arguments), ``metadata.json``. Layers
are stacked: ``decoder.layers.mlp.linear_fc1.weight`` is ``[L, 2F, D]``. Reading maps the files and
takes views of the chunks' bytes; writing holds one chunk.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

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
from megatron_prune.model.blocks import EMBEDDING
from megatron_prune.model.fusion import (
    LINEARS,
    TE_ATTENTION,
    Piece,
    megatron_name,
    piece,
    stored_shape,
)
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelConfig
from megatron_prune.parsing import checked_as
from megatron_prune.sources.source import Source, assemble
from megatron_prune.store.chunk import read_header
from megatron_prune.store.dist_index import INDEX, Chunk, Index, read_index
from megatron_prune.store.megatron import (
    ITERATION,
    Atom,
    atoms,
    by_stage,
    check_names,
    stored_layer,
)
from megatron_prune.store.writer import Progress, Writer, Written, ahead

__all__ = ["COMMON", "FORMAT", "INDEX", "DistSource", "DistWriter", "read_index"]

COMMON, FORMAT = "common.pt", "metadata.json"
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
        self._map, self._locate = cache(self._open), cache(self._find)
        self._stacks = any(k.startswith(LAYER_PREFIX) and stored_layer(k) < 0 for k in self._chunks)
        wanted = {self._place(name)[0] for name in names(config)}
        check_names(directory / INDEX, wanted, self._chunks)
        self._check_files(index.ends)
        self._check_shapes()

    def _open(self, file: str) -> mmap.mmap:
        path = self.path / file
        try:
            with open(path, "rb") as handle:
                return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; copy it again") from None

    def _find(self, chunk: Chunk) -> int:
        """Byte position of a chunk's values in its file."""
        path, data = self.path / chunk.file, self._map(chunk.file)
        stop = chunk.start + chunk.length
        if chunk.start < 0 or stop > len(data):
            raise DamagedError(f"{path}: {len(data)} bytes, the index wants {stop}; copy it again")
        with checked_as(DamagedError, path, "a chunk cannot be read", "; copy it again"):
            header = read_header(data, chunk.start, stop)
        found = header.dtype, header.sizes, header.stride
        contiguous = tuple(torch.empty(chunk.sizes, device="meta").stride())
        if found != (chunk.dtype, chunk.sizes, contiguous) or header.stop > stop:
            raise DamagedError(
                f"{path}: holds {header.dtype} {header.sizes} strided {header.stride} where the "
                f"index says {chunk.dtype} {chunk.sizes}; copy it again"
            )
        return header.start

    def _view(self, chunk: Chunk) -> Tensor:
        count, position = torch.Size(chunk.sizes).numel(), self._locate(chunk)
        data = self._map(chunk.file)
        return torch.frombuffer(data, dtype=chunk.dtype, count=count, offset=position).view(
            chunk.sizes
        )

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

    def _check_files(self, ends: Mapping[str, int]) -> None:
        """Refuse an index that reaches beyond the files it lies beside."""
        for file, end in ends.items():
            path = self.path / file
            if not path.is_file():
                raise DamagedError(f"{path}: is missing; copy it again")
            if path.stat().st_size < end:
                raise DamagedError(
                    f"{path}: {path.stat().st_size} bytes, the index wants {end}; copy it again"
                )

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
        x = self._view(chunk)
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
        self._locate.cache_clear()
        self._map.cache_clear()


class DistWriter(Writer):
    """Writes ``__R_0.distcp`` per model-parallel rank of the target, then the index over them.

    The chunk grid is the target's TP grid, so readers at that TP fetch whole chunks.
    """

    def __init__(self, source: Source, grid: ParallelGrid, args: Namespace) -> None:
        self._source, self._grid, self._args = source, grid, args
        self._ranks = {f"__{number}_0.distcp": rank for number, rank in enumerate(grid.ranks())}
        self.stages = by_stage(self._ranks)
        self.total_bytes = sum(a.bytes for rank in self._ranks.values() for a in self._atoms(*rank))

    def _atoms(self, tp_rank: int, pp_rank: int) -> Any:
        return atoms(self._source, self._grid, tp_rank, pp_rank, te_norms=True, shared=True)

    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Generator[None, None, Written]:
        directory.mkdir(parents=True, exist_ok=True)
        out = HashedFile.create(directory / file, pool)
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
        places: dict[MetadataIndex, _StorageInfo] = {}
        tensors: dict[str, list[Any]] = defaultdict(list)
        keys: dict[str, Any] = {}
        for file in self.files:
            for key, place, start, stop in written[file].payload:
                key = sys.intern(key)  # equal strings pickle alike only when they are one object
                info = _StorageInfo(relative_path=file, offset=start, length=stop - start)
                if place is None:
                    keys[key] = BytesStorageMetadata()
                    places[MetadataIndex(key)] = info
                    continue
                dtype, whole, offsets, sizes = place
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                tensors[key].append((dtype, whole, chunk))
                places[MetadataIndex(key, offset=torch.Size(offsets))] = info
        for key, chunks in tensors.items():
            dtype, whole, _ = chunks[0]
            parts = sorted((c for _, _, c in chunks), key=lambda c: tuple(c.offsets))
            keys[key] = TensorStorageMetadata(
                TensorProperties(dtype=dtype), torch.Size(whole), parts
            )
        order = sorted(places, key=lambda i: (i.fqn, tuple(i.offset or ())))
        index = Metadata(
            state_dict_metadata=dict(sorted(keys.items())),
            storage_data={place: places[place] for place in order},
            storage_meta=StorageMeta(),
            version="1.0.0",
        )
        common = io.BytesIO()
        torch.save({"args": self._args, "checkpoint_version": 3.0, "iteration": ITERATION}, common)
        write_file(directory / INDEX, pickle.dumps(index, protocol=4))
        write_file(directory / COMMON, common.getvalue())
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
