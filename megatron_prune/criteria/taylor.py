"""Taylor: by how much the loss changes, to first order, when a unit goes.

Molchanov et al. 2019 (arXiv:1906.10771, eq. 8) and LLM-Pruner (arXiv:2305.11627, eq. 5) at the
level of single weights: the sum over calibration samples and over the weights a unit owns of
|weight x gradient|. ``fisher`` sums (weight x gradient)^2, the diagonal of the empirical Fisher
information times the squared weight. Needs backward passes, one a sample.
"""

from __future__ import annotations

from megatron_prune.criteria.observed import Gradients
from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor


@criterion("taylor", axes="DQKFL", needs=("gradients",))
def taylor_scores(gradients: Gradients) -> dict[str, Tensor]:
    """D [D], Q [L, Q], K [L, K], F [L, F], L [L]: the mean over samples of the units' sums."""
    return {axis: x / gradients.samples for axis, x in gradients.first.items()}


@criterion("fisher", axes="DQKFL", needs=("gradients",))
def fisher_scores(gradients: Gradients) -> dict[str, Tensor]:
    """As `taylor_scores`, of the squares."""
    return {axis: x / gradients.samples for axis, x in gradients.second.items()}
