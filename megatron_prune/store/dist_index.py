"""The index (``.metadata``) of a torch_dist directory: which chunk of a tensor lies in which file.

It is a pickle, unpickled into plain records of ours (`dist_records`): nothing in it runs. What
comes out is checked field by field, because records rebuilt from damaged bytes can hold anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError
from megatron_prune.model.lazy import torch
from megatron_prune.store.dist_records import RECORDS, Metadata, TensorStorageMetadata, Word
from megatron_prune.store.untrusted import BoundedUnpickler

INDEX = ".metadata"
_MOST_BYTES = 1 << 26  # 400,000 chunks, and 20 s to look at each
_OPTIMIZER = "optimizer."  # how the keys of its state begin
_PLAIN = {
    "torch": {
        "Size", "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "bool",
    },
    "torch.serialization": {"_get_layout"},
}  # fmt: skip


def _enum_member(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 pickle an enum member as, ``getattr(class, name)``; no more."""
    if isinstance(kind, type) and issubclass(kind, Word):
        return kind()
    raise pickle.UnpicklingError(f"asks for {name!r} of {kind!r}, which no checkpoint index needs")


class _IndexUnpickler(BoundedUnpickler):
    """Builds the records of a checkpoint index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if (module, name) in RECORDS:
            return RECORDS[module, name]
        if name in _PLAIN.get(module, ()):
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


Stored = tuple[tuple[int, ...], list[Chunk]]
"""A stored tensor: its whole shape, and its chunks."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """What a torch_dist directory says it holds.

    Attributes:
        tensors: stored key -> (whole shape, chunks), without the optimizer's.
        optimizer: the same of its state, as far as that is tensors.
        ends: file -> bytes that are needed of it, whatever they are.
    """

    tensors: Mapping[str, Stored]
    optimizer: Mapping[str, Stored]
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
    tensors, optimizer = dict[str, Stored](), dict[str, Stored]()
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            whole, dtype = _sizes(entry.size), entry.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{key} is of dtype {dtype!r}")
            chunks = [_chunk(key, chunk, whole, dtype, places) for chunk in entry.chunks]
            (optimizer if key.startswith(_OPTIMIZER) else tensors)[key] = whole, chunks
    return Index(
        tensors=tensors,
        optimizer=optimizer,
        ends=ends,
        has_optimizer_state=any(key.startswith(_OPTIMIZER) for key in index.state_dict_metadata),
    )


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
