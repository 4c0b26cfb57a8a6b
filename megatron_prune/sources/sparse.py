"""A model whose matrices have got their zeros, with the record of it among its files; and one whose
zeros are counted."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_prune.model.lazy import Tensor
from megatron_prune.sources.replaced import RepairedSource, Tensors
from megatron_prune.sources.source import SPARSITY, DerivedSource, Source


class SparseSource(RepairedSource):
    """A model as `sparsify` leaves it: replaced matrices, everything else is read through.

    Its plan stays, which tells its shapes; low-rank factors are merged into what is written, and
    the state of an optimizer is one of other weights.

    Args:
        replaced: in the source's dtypes.
        record: the new ``sparsity.json``, in a directory that all ranks see. It takes the place of
            one that the source carries, and is read when the model is written, not before; so it
            may be missing until then.
    """

    def __init__(self, source: Source, replaced: Tensors, record: Path) -> None:
        super().__init__(source, replaced)
        self.lora, self.has_optimizer_state = None, False
        self.companion_files = {**source.companion_files, SPARSITY: record}


class CountedSource(DerivedSource):
    """Another source, some of whose weights are counted as they are read, and the zeros of them.

    Attributes:
        zeros, size: of what was read; of all ranks together their ratio is the share of zeros, as
            long as each weight is read as often as any other.
    """

    def __init__(self, source: Source, counted: Collection[str]) -> None:
        super().__init__(source)
        self.digest = source.digest  # the same weights; what it samples is not counted
        self._counted = counted
        self.zeros = self.size = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        x = self._source.read(name, start, stop)
        if name in self._counted:
            self.zeros += x.numel() - int(x.count_nonzero())
            self.size += x.numel()
        return x
