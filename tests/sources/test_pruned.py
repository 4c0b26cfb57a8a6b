"""A model as a plan leaves it: what of the source is read on the way."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.criteria import CRITERIA
from megatron_prune.model.axes import axes_of, names, split_dim, split_layer, tensor_shape
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import DerivedSource, Source
from megatron_prune.store import open_source


class Seen(DerivedSource):
    """Another source, and which values of its tensors were read."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.values: dict[str, int] = {}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        x = super().read(name, start, stop)
        self.values[name] = self.values.get(name, 0) + x.numel()
        return x


def test_all_of_a_layer_that_stays_is_read_once(models: Callable[[str], Path]) -> None:
    """So `FiniteSource` below it sees what is dropped as well as what stays."""
    source = open_source(models("gqa"))
    plan = make_plan(
        source.config.shape,
        Targets(hidden_size=32, num_attention_heads=3, ffn_hidden_size=40, drop_layers=(1,)),
        criterion=CRITERIA["random"],
        criterion_name="random",
        seed=3,
        prune_type="unbalance",
        balance_for=1,
        source_digest=source.digest,
    )
    seen = Seen(source)
    pruned = PrunedSource(seen, plan)
    seen.values.clear()
    whole = PrunedSource(source, plan)
    for name in names(pruned.config):
        axes = axes_of(name)
        if (dim := split_dim(axes)) is None:
            assert pruned.read(name).equal(whole.read(name))
            continue
        size = plan.target.size(axes[dim], split_layer(name)[0])
        parts = [pruned.read(name, at, min(at + 3, size)) for at in range(0, size, 3)]
        assert torch.cat(parts, dim).equal(whole.read(name))
    stays = {name for name in names(source.config) if split_layer(name)[0] != 1}
    assert seen.values == {name: prod(tensor_shape(name, source.config.shape)) for name in stays}
