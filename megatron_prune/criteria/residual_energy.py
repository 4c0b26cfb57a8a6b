"""Residual energy: a hidden channel's share of the normalised residual stream.

The mean over tokens and over all norms of (x_c / rms(x))^2, x the norm's input before its weight.
The mean over the kept channels is also by how much the denominator of RMSNorm shrinks when the
others go (`norm rescale`), so keeping the most energy disturbs the norms least.
"""

from __future__ import annotations

from megatron_prune.criteria.observed import Observed
from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor


@criterion("residual-energy", axes="D", needs=("observed",))
def residual_energy_scores(observed: Observed) -> dict[str, Tensor]:
    """D [D]: 1 on average."""
    return {"D": (observed.norm_energy / observed.tokens).mean(0)}
