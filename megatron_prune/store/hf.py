"""Hugging Face directories: safetensors (one file or an index), or ``pytorch_model*.bin``.

Reading maps files and takes views. Writing streams safetensors, whose layout is a JSON header and
then the tensors' bytes; the library's own writer wants a whole file's tensors at once, which for a
5 GB shard is 5 GB of memory, so the header is laid out here and the library reads it back in tests.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.families.config import hf_name, hf_place
from megatron_prune.files import HashedFile, write_file
from megatron_prune.model.axes import axes_of, names, split_dim, split_layer, tensor_shape
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig
from megatron_prune.parsing import check_header, checked_as, read_table
from megatron_prune.sources.source import Source
from megatron_prune.store.untrusted import load_untrusted
from megatron_prune.store.writer import Progress, Writer, Written, ahead, row_blocks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # older exports carry it and no model needs it
_MORE_TENSORS = 1000  # than a model has, may lie in its files
_NAMED_BYTES = 1 << 10  # of a header for one tensor; a long name takes 200
DEFAULT_SHARD_BYTES = 5 * 10**9  # transformers' default, so a repository looks as people expect
_WORDS = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
}  # fmt: skip
_DTYPE_WORD = {dtype: word for word, dtype in _WORDS.items()}


def find_weights(directory: Path, most: int) -> dict[str, Path] | Path:
    """The weight file of a directory, or the index: tensor name -> file.

    Args:
        most: tensors that it can have.

    Raises:
        CheckpointError: there are no weights.
        DamagedError: the index is not one, or points outside the directory.
    """
    for single, index in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        if (directory / index).is_file():
            return _read_weight_map(directory, directory / index, most)
        if (directory / single).is_file():
            return directory / single
    raise CheckpointError(f"{directory}: no {SINGLE}, {INDEX} or {BIN_SINGLE}; no weights to read")


def _read_weight_map(directory: Path, path: Path, most: int) -> dict[str, Path]:
    values = read_table(path, DamagedError, "not an index of weights")
    with checked_as(DamagedError, path, "not an index of weights"):
        items = [(str(name), str(file)) for name, file in values["weight_map"].items()]
    if len(items) > most:
        raise DamagedError(
            f"{path}: names {len(items)} tensors; config.json describes another model"
        )
    roots = [directory.resolve()]
    if directory.parent.name == "snapshots":  # the hub's cache: links into its own blobs
        roots.append((directory.parent.parent / "blobs").resolve())
    files: dict[str, Path] = {}
    for file in sorted({file for _, file in items}):
        plain = file and Path(file).name == file and not any(c in file for c in "\\\0")
        if not plain or (directory / file).resolve().parent not in roots:
            raise DamagedError(f"{path}: names {file!r}, outside its directory; not opened")
        if not (directory / file).is_file():
            missing = [name for name, of in items if of == file]
            raise DamagedError(
                f"{directory}: {file} is missing, with {len(missing)} tensors ({missing[0]}, ...); "
                "copy it again"
            )
        files[file] = directory / file
    return {name: files[file] for name, file in items}


class HuggingFaceSource(Source):
    """A Hugging Face directory; every name and shape is checked when it is opened.

    Args:
        stored_as: the family whose names its tensors have.
    """

    format = "hf"

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        stored_as: Family,
        *,
        companion_files: dict[str, Path],
        plan_path: Path | None,
    ) -> None:
        self.path, self.config = directory, config
        self.companion_files, self.plan_path = companion_files, plan_path
        self._stored_as = stored_as
        wanted = self._wanted()
        most = _MORE_TENSORS + 4 * len(wanted)  # a quantised model has three or four for each
        self._opened = cache(partial(_open_file, most=most))
        weights = find_weights(directory, most)
        if isinstance(weights, Path):
            weights = dict.fromkeys(self._opened(weights), weights)
        self._check(weights, wanted)
        self._files = weights

    def _place(self, name: str) -> tuple[str, int, int]:
        """The stored tensor that ``name`` is in, and which of how many blocks of its rows."""
        return hf_place(name, self._stored_as)

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        """The stored tensors and their shapes, as the configuration has them."""
        wanted = {}
        for name in names(self.config):
            stored, _, blocks = self._place(name)
            rows, *columns = tensor_shape(name, self.config.shape)
            wanted[stored] = (rows * blocks, *columns)
        return wanted

    def _check(self, weights: Mapping[str, Path], wanted: Mapping[str, tuple[int, ...]]) -> None:
        missing = [name for name in wanted if name not in weights]
        ignored = {"lm_head.weight"} if self.config.tied else set()
        unexpected = [
            name
            for name in weights
            if name not in wanted and name not in ignored and not name.endswith(_IGNORED_SUFFIXES)
        ]
        if missing or unexpected:
            raise DamagedError(
                f"{self.path}: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unexpected)} unexpected {unexpected[:3]}; its config.json describes another "
                "model, or the copy is not complete"
            )
        for name, shape in wanted.items():
            held = self._opened(weights[name])
            if name not in held:
                raise DamagedError(f"{weights[name]}: {name} is not in it; the index says it is")
            if (found := held[name].shape) != shape:
                raise DamagedError(
                    f"{weights[name]}: {name} is {found}, config.json says {shape}; one of the two "
                    "belongs to another model"
                )
        for name in wanted:
            if self._held(weights, name).dtype not in _DTYPE_WORD:
                raise CheckpointError(
                    f"{weights[name]}: {name} is {self._held(weights, name).dtype}; wanted a "
                    "floating-point model, not a quantised one"
                )

    def _held(self, weights: Mapping[str, Path], name: str) -> _Held:
        return self._opened(weights[name])[name]

    def stored_name(self, name: str) -> str:
        return self._place(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        return self._held(self._files, self.stored_name(name)).dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        axes = axes_of(name)
        stored, block, blocks = self._place(name)
        x, dim = self._held(self._files, stored).load().chunk(blocks)[block], split_dim(axes)
        if dim is None or (start == 0 and stop is None):
            return x
        rows = self.config.shape.rows(axes[dim])
        stop = self.config.shape.size(axes[dim], split_layer(name)[0]) if stop is None else stop
        return x.narrow(dim, start * rows, (stop - start) * rows)

    def close(self) -> None:
        super().close()
        self._opened.cache_clear()


class _Held:
    """A tensor in an open file."""

    def __init__(self, file: Any, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._file, self._name, self.shape, self.dtype = file, name, shape, dtype

    def load(self) -> Tensor:
        """The tensor as it is stored, ``shape`` and ``dtype``: a view of the mapped file."""
        if isinstance(self._file, dict):
            return self._file[self._name]
        return self._file.get_tensor(self._name)


def _open_file(path: Path, most: int) -> dict[str, _Held]:
    if path.suffix == ".bin":
        tensors = load_untrusted(path, mmap=True)
        if not isinstance(tensors, dict) or not all(
            isinstance(x, Tensor) for x in tensors.values()
        ):
            raise DamagedError(f"{path}: holds something other than named tensors; not loaded")
        return {n: _Held(tensors, n, tuple(x.shape), x.dtype) for n, x in tensors.items()}
    with checked_as(DamagedError, path, "not a file of this model's tensors"):
        check_header(path, most * _NAMED_BYTES)
    try:
        file = safe_open(path, framework="pt")
        held = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            dtype = _WORDS.get(part.get_dtype(), torch.uint8)
            held[name] = _Held(file, name, tuple(part.get_shape()), dtype)
        return held
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path}: {error}; copy it again") from None


class HuggingFaceWriter(Writer):
    """Writes safetensors, in shards of at most ``max_shard_bytes``, in the model's order."""

    def __init__(self, source: Source, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self._source, self._shape = source, source.config.shape
        shards: list[list[str]] = [[]]
        filled = 0
        for name in names(source.config):
            size = self._bytes(name)
            if shards[-1] and filled + size > max_shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        count = len(shards)
        self._shards = {
            SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors": shard
            for i, shard in enumerate(shards, 1)
        }
        self.stages = [[file] for file in self._shards]
        self.total_bytes = sum(self._bytes(name) for name in names(source.config))

    def _bytes(self, name: str) -> int:
        return prod(tensor_shape(name, self._shape)) * self._source.dtype(name).itemsize

    def write(
        self, directory: Path, file: str, pool: ThreadPoolExecutor, progress: Progress
    ) -> Generator[None, None, Written]:
        out = HashedFile.create(directory / file, pool)
        out.write(self._header(file))
        names = self._shards[file]
        reads = (read for name in names for read in row_blocks(self._source, name, self._shape))
        for values in ahead(reads, pool):
            out.write(values)
            progress(values.nbytes)
        yield
        return Written(out.close())

    def _header(self, file: str) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in self._shards[file]:
            stop = at + self._bytes(name)
            entries[hf_name(name, self._source.config.family)] = {
                "dtype": _DTYPE_WORD[self._source.dtype(name)],
                "shape": list(tensor_shape(name, self._shape)),
                "data_offsets": [at, stop],
            }
            at = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        return len(text).to_bytes(8, "little") + text

    def finish(self, directory: Path, written: Mapping[str, Written]) -> None:
        if len(self.files) == 1:
            return
        family = self._source.config.family
        weight_map = {
            hf_name(name, family): file for file, shard in self._shards.items() for name in shard
        }
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        write_file(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())
