"""Values that are NaN or infinite: found while they are read, named where they lie.

A checkpoint that holds some is broken, or was cast to a dtype that is too narrow for it. Nothing
downstream says so: it converts, and every plan made of it prunes.
"""

from __future__ import annotations

import math

from megatron_prune.errors import DamagedError
from megatron_prune.model.lazy import Tensor
from megatron_prune.sources.source import DerivedSource, Source


def is_finite(x: Tensor) -> bool:
    """Whether no value of a tensor of any float dtype is NaN or infinite.

    One pass without a copy, at 5 to 8 GB/s a core: NaN goes through both extremes.
    ``isfinite().all()`` makes a mask first, and takes ten times as long.
    """
    return x.numel() == 0 or all(math.isfinite(extreme.item()) for extreme in x.aminmax())


def nonfinite_text(source: Source, name: str) -> str:
    """Where a tensor's values stop being finite, and how many are not; reads it whole.

    It names the file's own tensor where that one holds them; otherwise what is made of it as
    ``source`` reads it, such as a cast to a narrower dtype.
    """
    origin, stored = source.origin(name)
    x = origin.read(stored)
    where = f"{origin.path}: {origin.stored_name(stored)}"
    if not is_finite(x):
        return f"{where}: {_counted(x)}"
    made = source.read(name)
    return f"{where}: finite in {x.dtype}; made into {made.dtype}, {_counted(made)}"


def _counted(x: Tensor) -> str:
    nan, infinite = int(x.isnan().sum()), int(x.isinf().sum())
    return f"{nan + infinite} of {x.numel()} values are not finite ({nan} NaN, {infinite} infinite)"


class FiniteSource(DerivedSource):
    """Another source whose values are looked at as they are read.

    Args:
        allow: go on where some are not finite.
        can_allow: whether there is a flag that would.

    Attributes:
        texts: what is wrong with each tensor that `read` met and that is not finite, where those
            are allowed.

    Raises:
        DamagedError: `read` met one; names tensor and number.
    """

    def __init__(self, source: Source, *, allow: bool, can_allow: bool = True) -> None:
        super().__init__(source)
        self._allow, self._can_allow = allow, can_allow
        self._found: dict[str, None] = {}

    @property
    def texts(self) -> list[str]:
        return [nonfinite_text(self._source, name) for name in self._found]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        x = self._source.read(name, start, stop)
        if not is_finite(x):
            if not self._allow:
                otherwise = ", or --allow-nonfinite" if self._can_allow else ""
                raise DamagedError(
                    f"{nonfinite_text(self._source, name)}; use another copy of the model"
                    f"{otherwise}"
                )
            self._found[name] = None
        return x
