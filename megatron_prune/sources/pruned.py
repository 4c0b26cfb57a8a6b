"""A model as a plan leaves it, read slice by slice. Pruning here is pure slicing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_prune.errors import PlanError
from megatron_prune.families.config import hf_config
from megatron_prune.model.axes import axes_of, layer_name, split_dim, split_layer
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.tensors import take
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.source import DerivedSource, Source


class PrunedSource(DerivedSource):
    """A model as a plan leaves it: reads through to the source, slice by slice.

    All of a tensor that stays is read, what goes of it too, but for rows of tokens: so whoever
    looks at the source's weights as they are read has seen them.

    Raises:
        PlanError: the plan was made for another model.
    """

    def __init__(self, source: Source, plan: PrunePlan) -> None:
        check_plan_fits(source, plan)
        super().__init__(source)
        self._forget_history()
        self._plan = plan
        config = replace(source.config, shape=plan.target)
        layers = None if plan.kept.layers is None else list(plan.kept.layers)
        values = hf_config(config, layers)
        window = config.family.window(values)  # gone where all layers that had it are
        self.config = replace(config, hf_config=values, sliding_window=window)
        self._rows = {axis: plan.source.rows(axis) for axis in "QK"}

    def _source_name(self, name: str) -> tuple[str, int | None]:
        layer, rest = split_layer(name)
        if layer is None:
            return name, None
        old = self._plan.layers[layer]
        return layer_name(old, rest), old

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._source_name(name)[0])

    def origin(self, name: str) -> tuple[Source, str]:
        return self._source.origin(self._source_name(name)[0])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        source_name, layer = self._source_name(name)
        axes = axes_of(name)
        dim = split_dim(axes)
        kept = {a: index for a in axes if (index := self._plan.tensor(a, layer)) is not None}
        if dim is None or axes[dim] not in kept:
            return take(self._source.read(source_name, start, stop), axes, kept, self._rows)
        parts = []
        for part, low, high in self._spans(kept.pop(axes[dim]), axes[dim], layer, start, stop):
            gaps = {} if len(part) == high - low else {axes[dim]: part - low}
            x = self._source.read(source_name, low, high)
            parts.append(take(x, axes, {**kept, **gaps}, self._rows))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _spans(
        self, kept: Tensor, axis: str, layer: int | None, start: int, stop: int | None
    ) -> Iterator[tuple[Tensor, int, int]]:
        """Of the kept indices ``[start, stop)`` parts, each with the range it is read in."""
        part = kept[start:stop]
        if axis == "V":
            yield from ((near, int(near[0]), int(near[-1]) + 1) for near in _near(part))
            return
        ends = [0, *kept[1:].tolist(), self._plan.source.size(axis, layer)]
        yield part, ends[start], ends[start + len(part)]


def _near(index: Tensor) -> Iterator[Tensor]:
    """Sorted ids in parts that span at most as many source rows as there are ids: few kept rows in
    many are then not read as one block, which a format may have to copy."""
    part = (index - index[0]) // len(index)
    yield from index.split(torch.unique_consecutive(part, return_counts=True)[1].tolist())


def check_plan_fits(source: Source, plan: PrunePlan) -> None:
    """Refuse a plan made for another model, before any weight is read whole."""
    if plan.source != source.config.shape:
        raise PlanError(
            f"{source.path}: is {source.config.shape.as_dict()}, the plan was made for "
            f"{plan.source.as_dict()}; make a plan for this model"
        )
    if plan.source_digest != source.digest:
        raise PlanError(
            f"{source.path}: same shape, other weights: its digest is {source.digest[:12]}..., "
            f"the plan was made for {plan.source_digest[:12]}...; make a plan for this model"
        )
