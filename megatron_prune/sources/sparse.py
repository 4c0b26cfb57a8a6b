"""A model whose matrices have got their zeros, and the record of it among its files."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.sources.replaced import RepairedSource, Tensors
from megatron_prune.sources.source import SPARSITY, Source


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
