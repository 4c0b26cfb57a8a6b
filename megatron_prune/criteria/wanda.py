"""Wanda by structure: the size of what a unit writes, its weights times its activations.

Sun et al. 2023 (arXiv:2306.11695, eq. 1) score a weight |W_oi| * ||X_i||; a unit owns whole columns
of the matrix behind it, and its score is the root of the sum of squares of theirs, as FASP
(arXiv:2501.09412) does with sums: ||W_:i|| * ||X_i||. Hidden channels: over all matrices that read
behind a norm. ``flap`` is the fluctuation metric of An et al. 2023 (FLAP, arXiv:2312.11983, eq. 4):
the variance of X_i in place of its second moment, since a bias could stand in for the mean.
"""

from __future__ import annotations

from megatron_prune.criteria.observed import Observed, WeightSquares
from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor


@criterion("wanda", axes="DQF", needs=("observed", "weights"))
def wanda_scores(observed: Observed, weights: WeightSquares) -> dict[str, Tensor]:
    """D [D], Q [L, Q], F [L, F]."""
    return {
        "D": (weights.readers * observed.norm_squares).sum(0).sqrt(),
        "Q": (weights.proj * observed.proj_squares).sum(2).sqrt(),
        "F": (weights.fc2 * observed.fc2_squares).sqrt(),
    }


@criterion("flap", axes="QKF", needs=("observed", "weights"))
def flap_scores(observed: Observed, weights: WeightSquares) -> dict[str, Tensor]:
    """Q [L, Q], K [L, K], F [L, F]: variance of the input times squared column norm; a group's is
    the sum of its heads', which are sums of squares already."""

    def variance(squares: Tensor, sums: Tensor) -> Tensor:
        mean = sums / observed.tokens
        return (squares / observed.tokens - mean.square()).clamp(min=0.0)

    proj = variance(observed.proj_squares, observed.proj_sums)
    fc2 = variance(observed.fc2_squares, observed.fc2_sums)
    heads = (weights.proj * proj).sum(2)
    groups = heads.view(*weights.units["K"].shape, -1).sum(2)
    return {"Q": heads, "K": groups, "F": weights.fc2 * fc2}
