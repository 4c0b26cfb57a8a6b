"""Hugging Face directories: safetensors (one file or an index), or ``pytorch_model*.bin``.

Reading maps files and takes views. Writing streams safetensors, whose layout is a JSON header and
then the tensors' bytes; the library's own writer wants a whole file's tensors at once, which for a
5 GB shard is 5 GB of memory, so the header is laid out here and the library reads it back in tests.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.families.config import hf_name, hf_place
from megatron_prune.families.unread import DEQUANTISE
from megatron_prune.files import HashedFile, write_file
from megatron_prune.files.contents import foreign_content
from megatron_prune.files.parsing import check_header, checked_as, read_table
from megatron_prune.model.axes import axes_of, names, split_dim, split_layer, tensor_shape
from megatron_prune.model.blocks import EMBEDDING, OUTPUT
from megatron_prune.model.family import Family
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelConfig
from megatron_prune.sources.source import Source
from megatron_prune.store.companions import belongs_to
from megatron_prune.store.recognise import foreign_names
from megatron_prune.store.untrusted import load_untrusted, plain_values
from megatron_prune.store.writer import Progress, Writer, Written, ahead, row_blocks

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SETS = ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX))
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)  # older exports carry it and no model needs it
_MOST_FILES = 10_000
_NAMED_BYTES = 1 << 10  # of a header for one tensor; a long name takes 200
DEFAULT_SHARD_BYTES = 5 * 10**9  # transformers' default, so a repository looks as people expect
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def has_weights(directory: Path) -> bool:
    """Whether there is a file that `find_weights` would read."""
    return any((directory / name).is_file() for pair in _SETS for name in pair)


def most_tensors(num_layers: int) -> int:
    """How many tensors can lie in the files of a model: a quantised one has 30 a layer."""
    return 1000 + 100 * num_layers


def find_weights(directory: Path) -> dict[str, Path] | Path:
    """The weight file of a directory that has one, or the index: tensor name -> file.

    Of several sets the first in transformers' order: safetensors before torch's files, and one file
    before an index.

    Raises:
        DamagedError: the index is not one, or points outside the directory.
    """
    for single, index in _SETS:
        if (directory / single).is_file():
            return directory / single
        if (directory / index).is_file():
            return _read_weight_map(directory, directory / index)
    raise AssertionError(f"{directory}: asked for weights where there are none")


def files_of(weights: Mapping[str, Path] | Path) -> set[str]:
    """Names of the files that `find_weights` found, with that of an index."""
    if isinstance(weights, Path):
        return {weights.name}
    files = {path.name for path in weights.values()}
    return files | {BIN_INDEX if any(name.endswith(".bin") for name in files) else INDEX}


def _read_weight_map(directory: Path, path: Path) -> dict[str, Path]:
    values = read_table(path, DamagedError, "not an index of weights")
    with checked_as(DamagedError, path, "not an index of weights"):
        items = [(str(name), str(file)) for name, file in values["weight_map"].items()]
    files: dict[str, Path] = {}
    named = sorted({file for _, file in items})
    if len(named) > _MOST_FILES:
        raise DamagedError(f"{path}: names {len(named)} files, more than any model has")
    for file in named:
        plain = file and Path(file).name == file and not any(c in file for c in "\\\0")
        if not plain or not belongs_to(directory, directory / file):
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
        weights: from `find_weights`.
    """

    format = "hf"

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        stored_as: Family,
        *,
        weights: Mapping[str, Path] | Path,
        companion_files: dict[str, Path],
        plan_path: Path | None,
    ) -> None:
        self.path, self.config = directory, config
        self.companion_files, self.plan_path = companion_files, plan_path
        self._opened = cache(partial(_open_file, most=most_tensors(config.shape.num_layers)))
        if isinstance(weights, Path):
            weights = dict.fromkeys(self._opened(weights), weights)
        self._stored_as, self._files = stored_as, weights
        self._embedding, self._head = (hf_name(w.name, stored_as) for w in (EMBEDDING, OUTPUT))
        if config.tied:
            self._tie()
        self._check(weights)

    def _tie(self) -> None:
        """What transformers 5 does where config.json says tied and the file has an output layer,
        as those of torch always have: equal values are one tensor, and of two that differ each
        stays what it is (PreTrainedModel.tie_weights). It compares every value.
        """
        if self._head not in self._files:
            return
        if self._embedding not in self._files:
            self._embedding = self._head
            return
        held = [self._held(self._files, name) for name in (self._embedding, self._head)]
        if held[0].shape != held[1].shape or not torch.equal(*(one.load() for one in held)):
            warnings.warn(
                f"{self.path}: config.json says tied, yet {self._head} has values of its own; it "
                "is kept and the model read as not tied, as transformers 5 does (others drop it)",
                stacklevel=2,
            )
            self.config = replace(self.config, tied=False)

    def _place(self, name: str) -> tuple[str, int, int]:
        """The stored tensor that ``name`` is in, and which of how many blocks of its rows."""
        if name == EMBEDDING.name:
            return self._embedding, 0, 1
        return hf_place(name, self._stored_as)

    def _check(self, weights: Mapping[str, Path]) -> None:
        wanted = {}
        for name in names(self.config):
            stored, _, blocks = self._place(name)
            rows, *columns = tensor_shape(name, self.config.shape)
            wanted[stored] = (rows * blocks, *columns)
        missing = [name for name in wanted if name not in weights]
        ignored = {self._head} if self.config.tied else set()
        unexpected = [
            name
            for name in weights
            if name not in wanted and name not in ignored and not name.endswith(_IGNORED_SUFFIXES)
        ]
        if what := foreign_names(unexpected, missing):
            raise CheckpointError(
                f"{self.path}: {what}; wanted the plain tensors of {self._stored_as.architecture}. "
                "Load it with what wrote it and save the plain model"
            )
        if missing or unexpected:
            or_less = ", or the copy is not complete" if missing else ""
            raise DamagedError(
                f"{self.path}: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unexpected)} unexpected {unexpected[:3]}; its config.json describes another "
                f"model{or_less}"
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
            if _word(self._held(weights, name).dtype) is None:
                raise CheckpointError(
                    f"{weights[name]}: {name} is {self._held(weights, name).dtype}; wanted a "
                    f"floating-point model, not a quantised one: {DEQUANTISE}"
                )

    def _held(self, weights: Mapping[str, Path], name: str) -> _Held:
        return self._opened(weights[name])[name]

    def stored_name(self, name: str) -> str:
        return self._place(name)[0]

    def dtype(self, name: str) -> torch.dtype:
        return self._held(self._files, self.stored_name(name)).dtype

    @property
    def first_dtype(self) -> torch.dtype:
        first = min(set(self._files.values()))
        found = [held.dtype for held in self._opened(first).values()]
        return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)

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


def _word(dtype: torch.dtype) -> str | None:
    """safetensors' word for the dtype of a weight."""
    return next((word for word, name in _DTYPES.items() if str(dtype) == f"torch.{name}"), None)


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
            isinstance(name, str) and isinstance(x, torch.Tensor) for name, x in tensors.items()
        ):
            raise DamagedError(f"{path}: holds something other than named tensors; not loaded")
        tensors = plain_values(tensors, path)
        return {n: _Held(tensors, n, tuple(x.shape), x.dtype) for n, x in tensors.items()}
    try:
        check_header(path, most * _NAMED_BYTES)
        file = safe_open(path, framework="pt")
        held = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            part = file.get_slice(name)
            dtype = getattr(torch, _DTYPES.get(part.get_dtype(), "uint8"))
            held[name] = _Held(file, name, tuple(part.get_shape()), dtype)
        return held
    except (SafetensorError, ValueError) as error:
        if what := foreign_content(path):
            raise CheckpointError(f"{path}: {what}") from None
        raise DamagedError(f"{path}: {error}; copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


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
                "dtype": _word(self._source.dtype(name)),
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
