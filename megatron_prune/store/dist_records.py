"""The records that an index of torch's distributed checkpoints is made of, without their modules.

Importing ``torch.distributed.checkpoint`` takes two seconds of CPU time, which to look at a
checkpoint or to write one needs not: the records are read into the classes here and written from
them under torch's names, byte for byte as torch 2.13 does.
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune.model.lazy import torch

# One object each: a pickle refers back to a string by what it is, not by what it says.
_METADATA, _FILES, _PLANS = (
    f"torch.distributed.checkpoint.{module}" for module in ("metadata", "filesystem", "planner")
)
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"


class Record:
    """A record; its attributes are what is pickled, in the order in which they are given."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Metadata(Record):
    """The whole index."""


class MetadataIndex(Record):
    """The key of a chunk: its tensor's and, but for bytes, where in it the chunk begins."""

    offset: Any = None


class TensorStorageMetadata(Record):
    """A tensor: properties, size and chunks."""


class BytesStorageMetadata(Record):
    """What is no tensor."""


class ChunkStorageMetadata(Record):
    """Offsets and sizes of a chunk."""


class StorageMeta(Record):
    """Of the checkpoint as a whole; nothing in it is needed."""


class StorageInfo(Record):
    """File, offset and length."""


class Word(Record):
    """A member of an enumeration, by its number."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return type(self), (self.number,)


class MemoryFormat(Word):
    pass


class WriteItemType(Word):
    pass


class TensorProperties(Record):
    """A tensor's dtype, and the rest of what torch once recorded of every tensor."""

    def __getstate__(self) -> Any:
        return self.dtype, torch.strided, False, _CONTIGUOUS, False

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


class Plan(Record):
    """How a checkpoint was written; nobody reads it."""


class WriteItem(Plan):
    pass


class TensorWriteData(Plan):
    pass


_CONTIGUOUS = MemoryFormat()
_NAMES: dict[type, tuple[str, str]] = {
    **{
        record: (_METADATA, record.__name__)
        for record in (
            *(Metadata, MetadataIndex, TensorStorageMetadata, BytesStorageMetadata),
            *(ChunkStorageMetadata, TensorProperties, StorageMeta),
        )
    },
    MemoryFormat: (_METADATA, "_MEM_FORMAT_ENCODING"),
    StorageInfo: (_FILES, "_StorageInfo"),
    Plan: (_PLANS, "SavePlan"),
    WriteItem: (_PLANS, "WriteItem"),
    WriteItemType: (_PLANS, "WriteItemType"),
    TensorWriteData: (_PLANS, "TensorWriteData"),
}
RECORDS: dict[tuple[str, str], type] = {
    **{name: record for record, name in _NAMES.items()},
    (_MCORE, "MCoreMetadata"): Metadata,  # megatron-core 0.15's, which add what nobody reads
    (_MCORE, "MCoreSavePlan"): Plan,
}
"""Module and name in a pickle -> our class."""


_PythonPickler: Any = pickle._Pickler


class _Pickler(_PythonPickler):
    """Names a record's class by torch's name; the C pickler would import that first."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if obj not in RECORDS.values():
            super().save_global(obj, name)
            return
        for word in _NAMES[obj]:
            self.save(word)
        self.write(pickle.STACK_GLOBAL)
        self.memoize(obj)

    dispatch: ClassVar = {**_PythonPickler.dispatch, type: save_global}


def dump_records(index: Metadata) -> bytes:
    """The bytes of an index."""
    out = io.BytesIO()
    _Pickler(out, protocol=4).dump(index)
    return out.getvalue()
