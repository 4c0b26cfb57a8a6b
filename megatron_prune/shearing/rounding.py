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

    Where the masks have not come down to the size, all sizes shrink by one factor until the FFN
    channels, which then fill up what is left, are at least half of those expected.

    Args:
        present: axis letter -> [rows, size] how likely each unit is to stay.
        most: parameters.
        ranks: tensor-parallel size to balance for, which groups and FFN channels are to divide by.
        parameters: of a model of a shape.

    Raises:
        PlanError: no shape is that small.
    """
    expected = _expected(present, shape)
    step = ranks * MULTIPLE if shape.ffn_hidden_size % (ranks * MULTIPLE) == 0 else ranks
    for percent in range(100, 0, -1):
        factor = percent / 100
        found = _rounded({letter: x * factor for letter, x in expected.items()}, shape, ranks)
        for width in range(shape.ffn_hidden_size // step * step, 0, -step):
            whole = replace(found, ffn_hidden_size=width)
            if parameters(whole) <= most:
                if width >= expected["F"] * factor / 2:
                    return whole
                break
    raise PlanError(
        f"--target-params {most}: no shape of this family is that small; its embeddings alone may "
        "be more. Give a shape, or prune the vocabulary first"
    )


def _expected(present: Mapping[str, Tensor], shape: ModelShape) -> dict[str, float]:
    """By axis letter: units that are expected to stay, of a layer on average over those that do."""
    layers = present["L"][0] if "L" in present else torch.ones(shape.num_layers)
    found = {letter: float(shape.size(letter)) for letter in "DQKFL"}
    for letter, x in present.items():
        counts = x.sum(1)
        is_outer = letter in "DL"
        found[letter] = float(counts[0] if is_outer else (counts * layers).sum() / layers.sum())
    return found


def _rounded(sizes: Mapping[str, float], shape: ModelShape, ranks: int) -> ModelShape:
    """All sizes but that of the FFN."""
    groups = _nearest(sizes["K"], shape.num_query_groups, ranks)
    # a head stays where its gate and its group's are open: of heads all groups count
    each = _nearest(sizes["Q"] / shape.num_query_groups, shape.heads_per_group, 1)
    return replace(
        shape,
        num_layers=_nearest(sizes["L"], shape.num_layers, 1),
        hidden_size=_nearest(sizes["D"], shape.hidden_size, MULTIPLE),
        num_query_groups=groups,
        num_attention_heads=groups * each,
    )
