"""Gates and models with gates folded in: what writes them is the package's own way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.plan import load_plan
from megatron_prune.shearing.folding import Gates
from megatron_prune.sources.folded import FoldedSource
from megatron_prune.sources.folding_record import Folding
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.stages.console import SILENT
from megatron_prune.stages.conversion import ConvertOptions
from megatron_prune.stages.writing import write
from megatron_prune.store import open_source

ALL = "DQKFL"


def random_gates(shape: ModelShape, axes: str = ALL, seed: int = 0) -> Gates:
    """Soft gates, 0.004 to 0.996 as hard concrete has them; a head and a layer that are closed."""
    generator = torch.Generator().manual_seed(seed)
    sizes: dict[str, tuple[int, ...]] = {
        "D": (shape.hidden_size,),
        "Q": (shape.num_layers, shape.num_attention_heads),
        "K": (shape.num_layers, shape.num_query_groups),
        "F": (shape.num_layers, shape.ffn_hidden_size),
        "L": (shape.num_layers,),
    }
    by_axis: dict[str, Tensor] = {
        axis: torch.rand(size, generator=generator) * 0.992 + 0.004
        for axis, size in sizes.items()
        if axis in axes
    }
    if "Q" in axes:
        by_axis["Q"][0, 0] = 0
    return Gates(shape=shape, by_axis=by_axis)


def make_folded(
    load: Path, plan_file: Path, save: Path, *, axes: str = ALL, seed: int = 0, **flags: Any
) -> Folding:
    """Write ``load`` as the plan leaves it with gates folded in, as `shear --save-pruned` does.

    Args:
        flags: of `convert`.
    """
    plan = load_plan(plan_file)
    options = ConvertOptions(load=load, save=save, **{"to": "hf", **flags})
    source = open_source(load)
    gates = random_gates(plan.target, axes, seed)
    record = Folding(
        plan_digest=plan.digest,
        source_digest=source.digest,
        settings={"mask_method": "hard-concrete", "iteration": 7},
        gates=gates,
    )
    folded = options.cast(FoldedSource(PrunedSource(source, plan), gates))
    write("shear", options, folded, options.target, SILENT, plan, folding=record)
    source.close()
    return record
