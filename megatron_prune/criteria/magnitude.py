"""Magnitude: L2 norm of all the weights a unit owns; needs no data.

The coupled weights of Ma et al. 2023 (LLM-Pruner, arXiv:2305.11627, section 3.1) with the L2 norm
as their size: a hidden channel owns its row or column of every tensor of the model, a head its
rows of linear_q and its columns of linear_proj, a group its keys, values and heads, an FFN channel
its rows of gate and up and its column of linear_fc2.
"""

from __future__ import annotations

from megatron_prune.criteria.observed import WeightSquares
from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor


@criterion("magnitude", axes="DQKFL", needs=("weights",))
def magnitude_scores(weights: WeightSquares) -> dict[str, Tensor]:
    """D [D], Q [L, Q], K [L, K], F [L, F], L [L]: root of the sum of squares."""
    return {axis: squares.sqrt() for axis, squares in weights.units.items()}
