"""Loading a sharded state with megatron.core.dist_checkpointing, without its readers.

torch's reader of ``.metadata`` runs what is pickled in it, and so it does with every entry that
``.metadata`` calls bytes; Megatron's reader of ``common.pt`` does when the environment asks for it.
A checkpoint may be a stranger's. So Megatron says which part of which tensor a rank needs, and our
own reader gets it: the index by an allow-list, the values as views of the file. No entry of bytes
is ever opened.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy, LoadShardedStrategy
from torch import Tensor

from megatron_prune.engine.failures import together
from megatron_prune.errors import DamagedError
from megatron_prune.ranks import Ranks
from megatron_prune.store.dist_chunks import ChunkFiles
from megatron_prune.store.dist_index import read_index
from megatron_prune.store.mcore_dist import COMMON
from megatron_prune.store.untrusted import load_untrusted


def load_sharded(wanted: dict[str, Any], directory: Path, ranks: Ranks) -> dict[str, Any]:
    """What ``common.pt`` holds, and of the rest the parts that this rank wants.

    Called on all ranks.

    Args:
        wanted: a state whose leaves say, as `ShardedTensor`, which part of what they are; their
            values are overwritten.

    Raises:
        DamagedError: a tensor is not there, is no tensor, has another shape or is not whole; or
            what is there cannot be read.
        DistributedError: that happened to another rank.
    """
    sharded: Any = _Sharded(ranks)
    loaded: dict[str, Any] = dist_checkpointing.load(wanted, str(directory), sharded, _Common())
    return loaded


class _AnyVersion:
    """`open_source` has looked at what the directory says of its format."""

    def check_backend_compatibility(self, loaded_backend: object) -> None: ...

    def check_version_compatibility(self, loaded_version: object) -> None: ...


class _Common(_AnyVersion, LoadCommonStrategy):
    def load_common(self, checkpoint_dir: str | Path) -> Any:
        return load_untrusted(Path(checkpoint_dir) / COMMON, mmap=False)

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: object) -> Any:
        raise AssertionError("not asked for by a strategy that takes objects itself")


class _Sharded(_AnyVersion, LoadShardedStrategy):
    can_handle_sharded_objects = True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def load(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
        def read_all() -> Any:
            parts = _Parts(Path(checkpoint_dir))
            return dict_list_map_outplace(parts.read, sharded_state_dict)

        return together(self._ranks, read_all)

    def load_tensors_metadata(self, checkpoint_dir: object) -> Any:
        raise AssertionError("not asked for where unexpected entries are no fault")


class _Parts:
    """Parts of the tensors of one directory."""

    def __init__(self, directory: Path) -> None:
        index = read_index(directory)
        self._directory, self._files = directory, ChunkFiles(directory, index)
        self._stored = {**index.tensors, **index.optimizer}

    def read(self, wanted: ShardedTensor | ShardedObject) -> Any:
        if isinstance(wanted, ShardedTensor):
            return self._tensor(wanted)
        # of Transformer Engine: scales for FP8, which nothing here computes in. The layer's own
        # state stays; what a file says, Transformer Engine would unpickle
        assert wanted.key.endswith("_extra_state"), wanted.key
        return wanted.data

    def _tensor(self, wanted: ShardedTensor) -> Tensor:
        """The part of a tensor, put where ``wanted`` has its values."""
        if wanted.key not in self._stored:
            raise DamagedError(f"{self._directory}: holds no tensor {wanted.key}")
        whole, chunks = self._stored[wanted.key]
        shape, is_padded = tuple(wanted.global_shape), wanted.allow_shape_mismatch
        rows = 1 if is_padded else 0  # the first dim of a vocabulary is padded for the layout
        if whole[rows:] != shape[rows:] or len(whole) != len(shape):
            raise DamagedError(
                f"{self._directory}: {wanted.key} is of shape {whole}; wanted {shape}, by the "
                "model's configuration"
            )
        if wanted.data is None:
            wanted.init_data("cpu")
        values = wanted.data.detach()
        if is_padded:
            values.zero_()
        first, sizes = wanted.global_offset, (1,) * wanted.prepend_axis_num + wanted.local_shape
        missing = prod(max(0, min(n, end - at)) for at, n, end in zip(first, sizes, whole))
        place = values[(None,) * wanted.prepend_axis_num]
        for chunk in chunks:
            low = [max(pair) for pair in zip(first, chunk.offsets)]
            high = [
                min(at + n, start + count)
                for at, n, start, count in zip(first, sizes, chunk.offsets, chunk.sizes)
            ]
            if any(a >= b for a, b in zip(low, high)):
                continue
            here = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, first))
            there = tuple(slice(a - at, b - at) for a, b, at in zip(low, high, chunk.offsets))
            place[here].copy_(self._files.view(chunk)[there])
            missing -= prod(b - a for a, b in zip(low, high))
        if missing:
            raise DamagedError(
                f"{self._directory}: {wanted.key}: {missing} of its values at {first} are in no "
                "file, or in several; copy it again"
            )
        return values
