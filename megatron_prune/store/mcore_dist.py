"""Megatron's distributed format (``--ckpt-format torch_dist``), read and written without Megatron.

A directory of torch's distributed checkpoint: ``.metadata`` (pickled index), ``__R_0.distcp``
(chunks, each a small ``torch.save`` archive), ``common.pt`` (arguments), ``metadata.json``. Layers
are stacked: ``decoder.layers.mlp.linear_fc1.weight`` is ``[L, 2F, D]``. Reading maps the files and
takes views of the chunks' bytes; writing holds one chunk. The index is unpickled by an allow-list:
nothing in it runs.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import sys
import zipfile
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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

from megatron_prune.axes import axes_of, names, split_dim, split_layer, tensor_shape
from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.grid import ParallelGrid
from megatron_prune.shape import ModelConfig
from megatron_prune.source import Piece, Source, assemble
from megatron_prune.store.chunk import read_header
from megatron_prune.store.commit import HashedFile, write_file
from megatron_prune.store.megatron import ITERATION, Atom, atoms, plain_piece, qkv_piece
from megatron_prune.store.names import LINEARS, TE_ATTENTION, in_layer, megatron_name
from megatron_prune.store.writer import Progress, Writer, Written

INDEX, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
_FORMAT_FACTS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_DCP = "torch.distributed.checkpoint."
_ALLOWED = {
    "torch": {
        "Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    },
    "torch.serialization": {"_get_layout"},
    f"{_DCP}metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata",
        "ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta",
    },
    f"{_DCP}filesystem": {"_StorageInfo"},
    f"{_DCP}planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    """Builds the records of a checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint index needs")


def read_index(directory: Path) -> Metadata:
    """The index of a torch_dist directory.

    Raises:
        DamagedError: it is missing, cut short, names anything but index records, or points to a
            file outside the directory.
    """
    path = directory / INDEX
    try:
        with open(path, "rb") as file:
            index = _IndexUnpickler(file).load()
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}; copy it again") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedError(f"{path}: {error or type(error).__name__}; not loaded") from None
    if not isinstance(index, Metadata) or not isinstance(index.storage_data, dict):
        raise DamagedError(f"{path}: not a checkpoint index")
    for info in index.storage_data.values():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or "\\" in name:
            raise DamagedError(f"{path}: points to {name!r}, outside its directory; not opened")
    return index


@dataclass(frozen=True)
class _Chunk:
    """Where one stored chunk lies: its place in the whole tensor, and in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    length: int


class DistSource(Source):
    """A torch_dist checkpoint, ours or stock Megatron's, at any TP and PP."""

    format = "torch_dist"

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        grid: ParallelGrid,
        index: Metadata,
        *,
        companion_files: dict[str, Path],
        plan_path: Path | None,
        iteration: int,
    ) -> None:
        self.path, self.config, self.grid = directory, config, grid
        self.companion_files, self.plan_path = companion_files, plan_path
        self.iteration = iteration
        keys = index.state_dict_metadata
        self.has_optimizer_state = any(key.startswith("optimizer.") for key in keys)
        self._chunks = _chunks_of(index, directory)
        self._map, self._locate = cache(self._open), cache(self._find)
        self._check_shapes()

    def _open(self, file: str) -> mmap.mmap:
        path = self.path / file
        try:
            with open(path, "rb") as handle:
                return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path}: {error}; copy it again") from None

    def _find(self, chunk: _Chunk) -> int:
        """Byte position of a chunk's values in its file."""
        path, data = self.path / chunk.file, self._map(chunk.file)
        stop = chunk.start + chunk.length
        if chunk.start < 0 or stop > len(data):
            raise DamagedError(f"{path}: {len(data)} bytes, the index wants {stop}; copy it again")
        try:
            header = read_header(data, chunk.start, stop)
        except (ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise DamagedError(f"{path}: a chunk cannot be read: {error}; copy it again") from None
        found = header.dtype, header.sizes, header.stride
        contiguous = tuple(torch.empty(chunk.sizes, device="meta").stride())
        if found != (chunk.dtype, chunk.sizes, contiguous) or header.stop > stop:
            raise DamagedError(
                f"{path}: holds {header.dtype} {header.sizes} strided {header.stride} where the "
                f"index says {chunk.dtype} {chunk.sizes}; copy it again"
            )
        return header.start

    def _view(self, chunk: _Chunk) -> Tensor:
        count, position = torch.Size(chunk.sizes).numel(), self._locate(chunk)
        data = self._map(chunk.file)
        return torch.frombuffer(data, dtype=chunk.dtype, count=count, offset=position).view(
            chunk.sizes
        )

    def _stored(self, name: str) -> tuple[list[_Chunk], int | None, str, tuple[int, ...]]:
        """Chunks of the stored tensor, the layer within it (stacked keys), the part, its shape."""
        layer, rest = split_layer(name)
        stored, part = megatron_name(rest, te_norms=True)
        stacked = f"decoder.layers.{stored}"
        key = stacked if layer is not None and stacked in self._chunks else in_layer(layer, stored)
        if key not in self._chunks:
            raise DamagedError(f"{self.path / INDEX}: {key} is missing; copy the checkpoint again")
        whole, chunks = self._chunks[key]
        if key != stacked or layer is None:
            return chunks, None, part, whole
        mine = [c for c in chunks if c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        return mine, layer, part, whole[1:]

    def _check_shapes(self) -> None:
        shape = self.config.shape
        for name in names(self.config):
            _, _, part, stored = self._stored(name)
            wanted = list(tensor_shape(name, shape))
            if part in ("q", "k", "v"):
                wanted[0] = shape.num_query_groups * (shape.heads_per_group + 2) * shape.kv_channels
            elif part:
                wanted[0] *= 2
            elif axes_of(name)[0] == "V" and stored[0] >= wanted[0]:
                wanted[0] = stored[0]  # padded rows
            if stored != tuple(wanted):
                raise DamagedError(
                    f"{self.path}: {name}: stored as {stored}, its configuration says "
                    f"{tuple(wanted)}"
                )

    def dtype(self, name: str) -> torch.dtype:
        return self._stored(name)[0][0].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        axes = axes_of(name)
        dim = split_dim(axes)
        chunks, layer, part, _ = self._stored(name)
        if dim is None:
            if not chunks:
                raise DamagedError(f"{self.path / INDEX}: {name} has no chunk")
            return self._within(chunks[0], layer)
        stop = self.config.shape.size(axes[dim]) if stop is None else stop
        pieces = [p for c in chunks if (p := self._piece(c, layer, part, axes, dim)) is not None]
        return assemble(name, pieces, start, stop, self.path)

    def _within(self, chunk: _Chunk, layer: int | None) -> Tensor:
        x = self._view(chunk)
        return x if layer is None else x[layer - chunk.offsets[0]]

    def _piece(
        self, chunk: _Chunk, layer: int | None, part: str, axes: str, dim: int
    ) -> Piece | None:
        shape = self.config.shape
        lead = 0 if layer is None else 1
        begin, count = chunk.offsets[dim + lead], chunk.sizes[dim + lead]
        if any(chunk.offsets[lead + d] for d in range(len(axes)) if d != dim):
            raise CheckpointError(
                f"{self.path}: {axes} is cut along a dim that tensor parallelism does not cut"
            )
        if part in ("q", "k", "v"):
            per_group = (shape.heads_per_group + 2) * shape.kv_channels
            if begin % per_group or count % per_group:
                raise CheckpointError(
                    f"{self.path}: linear_qkv is cut inside a query group, at row {begin}"
                )
            return qkv_piece(
                lambda: self._within(chunk, layer),
                part,
                begin // per_group,
                count // per_group,
                self.config,
            )
        axis = axes[dim]
        rows, size = shape.rows(axis), shape.size(axis)
        base = size * rows if part == "up" else 0
        low, high = max(begin, base), begin + count
        if part:
            high = min(high, base + size * rows)
        if low >= high:
            return None
        return plain_piece(
            lambda: self._within(chunk, layer).narrow(dim, low - begin, high - low),
            (low - base) // rows,
            (high - base) // rows,
            dim=dim,
            rows=rows,
        )

    def close(self) -> None:
        self._locate.cache_clear()
        self._map.cache_clear()


def _chunks_of(index: Metadata, directory: Path) -> dict[str, tuple[tuple[int, ...], list[_Chunk]]]:
    """Stored model tensors: key -> (whole shape, chunks). Optimizer state is left out."""
    places = {
        (i.fqn, None if i.offset is None else tuple(i.offset)): info
        for i, info in index.storage_data.items()
    }
    out = {}
    for key, entry in index.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata) or key.startswith("optimizer."):
            continue
        chunks = []
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            info = places.get((key, offsets))
            if info is None:
                raise DamagedError(f"{directory / INDEX}: {key} at {offsets} lies in no file")
            where = info.relative_path, info.offset, info.length
            chunks.append(_Chunk(offsets, sizes, entry.properties.dtype, *where))
        out[key] = tuple(entry.size), chunks
    return out


class DistWriter(Writer):
    """Writes ``__R_0.distcp`` per model-parallel rank of the target, then the index over them.

    The chunk grid is the target's TP grid, so readers at that TP fetch whole chunks.
    """

    def __init__(self, source: Source, grid: ParallelGrid, args: Namespace) -> None:
        self._source, self._grid, self._args = source, grid, args
        self._ranks = {f"__{number}_0.distcp": rank for number, rank in enumerate(grid.ranks())}
        self.files = list(self._ranks)
        self.total_bytes = sum(a.bytes for rank in self._ranks.values() for a in self._atoms(*rank))

    def _atoms(self, tp_rank: int, pp_rank: int) -> Any:
        return atoms(self._source, self._grid, tp_rank, pp_rank, te_norms=True, shared=True)

    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Written:
        directory.mkdir(parents=True, exist_ok=True)
        out = HashedFile(directory / file, pool)
        entries = []
        torch.serialization.set_crc32_options(False)  # the manifest's SHA-256 covers every byte
        try:
            for atom in self._atoms(*self._ranks[file]):
                offset = out.position
                lead = () if atom.layer is None else (1,)
                torch.save(_alone(atom.pull().reshape(*lead, *atom.shape)), cast(Any, out))
                entries.append((atom_key(atom), _stacked(atom, self._layers), offset, out.position))
                progress(atom.bytes)
            if self._ranks[file] == (0, 0):
                entries += self._extra_states(out)
        finally:
            torch.serialization.set_crc32_options(True)
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


def _alone(x: Tensor) -> Tensor:
    """The same values on a storage of just their size, which is what ``torch.save`` writes."""
    values = x.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(values).view(x.dtype).view(x.shape)
