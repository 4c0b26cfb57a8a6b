"""Activation: how much a unit moves, exactly as Minitron scores it.

Muralidharan et al. 2024, arXiv:2407.14679, eq. 3 to 5, with the aggregation of NVIDIA's code: for
one channel c of one sample, a = mean over the sequence of |X_c|; the score is the root of the sum
of a^2 over all samples. Hidden: X is a norm's output, scores summed over the layers' norms, the
final one left out. FFN: X is linear_fc2's input. Heads: linear_proj's input, squares summed over
the head's channels. Layers: 1 - mean cosine(input, output), the block influence of ShortGPT
(arXiv:2403.03853, eq. 1).

It never looks at a weight: a channel that is large and ignored scores high.
"""

from __future__ import annotations

from megatron_prune.criteria.observed import Observed
from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor


@criterion("activation", axes="DQFL", needs=("observed",))
def activation_scores(observed: Observed) -> dict[str, Tensor]:
    """D [D], Q [L, Q], F [L, F], L [L]."""
    return {
        "D": observed.norm_abs[:-1].sqrt().sum(0),
        "Q": observed.proj_abs.sum(2).sqrt(),
        "F": observed.fc2_abs.sqrt(),
        "L": 1.0 - observed.layer_cosine / observed.tokens,
    }
