"""The index (``.metadata``) of a torch_dist directory: which chunk of a tensor lies in which file.

It is a pickle, unpickled by an allow-list of record classes: nothing in it runs. What comes out is
checked field by field, because records rebuilt from damaged bytes can hold anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_prune.errors import DamagedError

INDEX = ".metadata"
_MOST_BYTES = 1 << 26  # 400,000 chunks, and 20 s to look at each
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


def _enum_member(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle an enum member as, ``getattr(class, name)``; no more."""
    if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"asks for {name!r} of {kind!r}, which no checkpoint index needs")


class _IndexUnpickler(pickle.Unpickler):
    """Builds the records of a checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"names {module}.{name}, which no checkpoint index needs")


@dataclass(frozen=True)
class Chunk:
    """Where one stored chunk lies: its place in the whole tensor, and in which file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    file: str
    start: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a torch_dist directory says it holds.

    Attributes:
        tensors: stored key -> (whole shape, chunks), without optimizer state.
        ends: file -> bytes that are needed of it, whatever they are.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], list[Chunk]]]
    ends: Mapping[str, int]
    has_optimizer_state: bool


def read_index(directory: Path) -> Index:
    """The index of a torch_dist directory.

    Raises:
        DamagedError: it is missing, cut short, names anything but index records, or points to a
            file outside the directory.
    """
    path = directory / INDEX
    try:
        with open(path, "rb") as file:
            if (size := path.stat().st_size) > _MOST_BYTES:
                raise ValueError(f"{size} bytes; wanted at most {_MOST_BYTES}")
            return _checked(_IndexUnpickler(file).load())
    except OSError as error:
        raise DamagedError(f"{path}: {error.strerror}; copy it again") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise DamagedError(f"{path}: {error or type(error).__name__}; not loaded") from None


def _checked(index: Any) -> Index:
    """The records as plain values. Whatever they are not, raises ValueError or something else."""
    if not isinstance(index, Metadata):
        raise ValueError("not a checkpoint index")
    places, ends = {}, dict[str, int]()
    for place, info in index.storage_data.items():
        file, (start, length) = info.relative_path, _sizes((info.offset, info.length))
        plain = isinstance(file, str) and Path(file).name == file and file not in ("", "..")
        if not plain or any(c in file for c in "\0\\"):
            raise ValueError(f"points to {file!r}, outside its directory")
        places[place.fqn, None if place.offset is None else _sizes(place.offset)] = info
        ends[file] = max(ends.get(file, 0), start + length)
    tensors = {}
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer."):
            whole, dtype = _sizes(entry.size), entry.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{key} is of dtype {dtype!r}")
            tensors[key] = (
                whole,
                [_chunk(key, chunk, whole, dtype, places) for chunk in entry.chunks],
            )
    has_optimizer_state = any(key.startswith("optimizer.") for key in index.state_dict_metadata)
    return Index(tensors=tensors, ends=ends, has_optimizer_state=has_optimizer_state)


def _chunk(
    key: str, chunk: Any, whole: tuple[int, ...], dtype: torch.dtype, places: Mapping[Any, Any]
) -> Chunk:
    offsets, sizes = _sizes(chunk.offsets), _sizes(chunk.sizes)
    inside = len(offsets) == len(sizes) == len(whole) and all(
        offset + size <= all_of_it for offset, size, all_of_it in zip(offsets, sizes, whole)
    )
    if not inside:
        raise ValueError(f"{key}: a chunk of {sizes} at {offsets} of {whole}")
    if (key, offsets) not in places:
        raise ValueError(f"{key} at {offsets} lies in no file")
    info = places[key, offsets]
    return Chunk(offsets, sizes, dtype, info.relative_path, info.offset, info.length)


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    if any(type(n) is not int or n < 0 for n in sizes):
        raise ValueError(f"{sizes} are no sizes")
    return sizes
