"""Where the values of a ``torch.save`` archive lie: a chunk inside a ``.distcp`` file, or a file.

A chunk is a small zip: ``*/data.pkl`` describes one tensor, ``*/data/0`` holds its bytes, neither
of them compressed. Reading the two headers gives a position to map; ``torch.load`` would copy the
values and takes a file, not a range of one. The description is unpickled by an allow-list that
builds nothing but tuples.
"""

from __future__ import annotations

import io
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_prune.model.lazy import torch
from megatron_prune.store.untrusted import BoundedUnpickler

_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
}
_LOCAL_HEADER = 30  # bytes, of which 26..29 hold the lengths of name and extra field


@dataclass(frozen=True)
class ChunkHeader:
    """A stored tensor: dtype, sizes, stride, and the bytes ``[start, stop)`` of its values."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    stop: int


class _Description(BoundedUnpickler):
    """Gives the arguments a tensor would be rebuilt from; calls nothing of the file's choosing."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: arguments
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return getattr(torch, _STORAGES[name])
        raise pickle.UnpicklingError(f"names {module}.{name}; wanted one plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


class _Range(io.RawIOBase):
    """A range of a map as a file, for zipfile to find its directory in."""

    def __init__(self, data: mmap.mmap, start: int, stop: int) -> None:
        self._data, self._start, self._size, self._at = data, start, stop - start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        left = self._size - self._at
        count = left if size is None or size < 0 else min(size, left)
        at = self._start + self._at
        self._at += count
        return self._data[at : at + count]

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError("seek before the chunk")
        self._at = at
        return at

    def tell(self) -> int:
        return self._at


def record_places(data: mmap.mmap, start: int, stop: int) -> Callable[[str], tuple[int, int]]:
    """Name of a record, without the archive's own -> the bytes of ``data`` that it takes.

    Raises:
        ValueError, KeyError, zipfile.BadZipFile: not such an archive; also from the function.
    """
    with zipfile.ZipFile(_Range(data, start, stop)) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def place(name: str) -> tuple[int, int]:
        info = records[name]
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        at = start + info.header_offset
        lengths = data[at + 26 : at + 30]
        begin = at + _LOCAL_HEADER + int.from_bytes(lengths[:2], "little")
        begin += int.from_bytes(lengths[2:], "little")
        if begin + info.file_size > stop:
            raise ValueError(f"{name} ends behind the chunk")
        return begin, begin + info.file_size

    return place


def read_header(data: mmap.mmap, start: int, stop: int) -> ChunkHeader:
    """The header of the archive in bytes ``[start, stop)`` of a map.

    It raises whatever zipfile and pickle raise on what is no such archive (`parsing.checked_as`).
    """
    place = record_places(data, start, stop)
    first, last = place("data.pkl")
    storage, offset, sizes, stride, *_ = _Description(io.BytesIO(data[first:last])).load()
    _, dtype, key, _, count = storage
    begin, end = place(f"data/{key}")
    if not isinstance(dtype, torch.dtype) or count * dtype.itemsize != end - begin:
        raise ValueError("its values are not as many as it says")
    begin += offset * dtype.itemsize
    values = torch.Size(sizes).numel() * dtype.itemsize
    if offset < 0 or begin + values > end:
        raise ValueError("its values end behind their record")
    return ChunkHeader(dtype, tuple(sizes), tuple(stride), begin, begin + values)
