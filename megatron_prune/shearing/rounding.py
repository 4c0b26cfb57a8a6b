"""A shape that engines run, from sizes that masks have come to.

With a target for the whole model alone the expected sizes are any numbers. Depth, hidden channels
and heads are rounded; FFN channels, the finest of all, then bring the model to its size from below.
The layout that trains the masks does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from megatron_prune.errors import PlanError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelShape

MULTIPLE = 8  # of hidden and FFN channels, where the model's own are; kernels want it


def _nearest(expected: float, size: int, multiple: int) -> int:
    """The multiple nearest to a number, at least one of them and at most ``size``."""
    multiple = multiple if size % multiple == 0 else 1
    return min(size, max(multiple, round(expected / multiple) * multiple))


def legal_shape(
    present: Mapping[str, Tensor],
    shape: ModelShape,
    most: int,
    ranks: int,
    parameters: Callable[[ModelShape], int],
) -> ModelShape:
    """The shape nearest to the expected sizes that has at most so many parameters.

    Args:
        present: axis letter -> [rows, size] how likely each unit is to stay.
        most: parameters.
        ranks: tensor-parallel size to balance for, which groups and FFN channels are to divide by.
        parameters: of a model of a shape.

    Raises:
        PlanError: even without FFN channels it has more.
    """
    layers_L = present["L"][0] if "L" in present else None
    sizes: dict[str, int] = {}
    if layers_L is not None:
        sizes["num_layers"] = _nearest(float(layers_L.sum()), shape.num_layers, 1)
    if "D" in present:
        sizes["hidden_size"] = _nearest(float(present["D"].sum()), shape.hidden_size, MULTIPLE)

    def of_layer(x_LN: Tensor) -> float:
        """Units a layer, on average over the layers that stay."""
        counts = x_LN.sum(1)
        weight_L = torch.ones_like(counts) if layers_L is None else layers_L
        return float((counts * weight_L).sum() / weight_L.sum())

    groups, each = shape.num_query_groups, shape.heads_per_group
    if "K" in present:
        groups = _nearest(of_layer(present["K"]), groups, ranks)
    if "Q" in present:
        each = _nearest(of_layer(present["Q"]) / shape.num_query_groups, each, 1)
    sizes |= {"num_query_groups": groups, "num_attention_heads": groups * each}
    step = ranks * MULTIPLE if shape.ffn_hidden_size % (ranks * MULTIPLE) == 0 else ranks
    for width in range(shape.ffn_hidden_size // step * step, 0, -step):
        found = replace(shape, ffn_hidden_size=width, **sizes)  # type: ignore[arg-type]
        if parameters(found) <= most:
            return found
    raise PlanError(
        f"--target-params {most}: the masks have come to {sizes}, which is more without any FFN "
        "channel; train longer, or give a shape"
    )
