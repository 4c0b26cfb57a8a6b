"""A pruned model with the gates that were learned with it folded into its weights."""

from __future__ import annotations

from megatron_prune.errors import ShapeError
from megatron_prune.model.lazy import Tensor
from megatron_prune.shearing.folding import Gates, fold
from megatron_prune.sources.source import DerivedSource, Source


class FoldedSource(DerivedSource):
    """A pruned model whose weights are multiplied by its gates as they are read; see
    `shearing.folding`.

    A read holds the slice and a copy of it in float32. Products are rounded to the dtype of
    ``source``, which has to be the trained model's for `verify` to make the same: a cast goes
    around this source, not inside of it.

    Args:
        source: the pruned model.

    Raises:
        ShapeError: the gates are of a model of another shape.
    """

    def __init__(self, source: Source, gates: Gates) -> None:
        if gates.shape != source.config.shape:
            raise ShapeError(
                f"{source.path}: is {source.config.shape.as_dict()} when pruned, its gates are of "
                f"{gates.shape.as_dict()}; take the gates that the plan keeps"
            )
        super().__init__(source)
        self._forget_history()
        self._gates = gates

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        x = self._source.read(name, start, stop)
        return fold(name, x, self.config, self._gates, start, stop)
