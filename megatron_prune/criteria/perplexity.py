"""Perplexity: what the loss becomes without a layer; for layers only.

One-shot (``perplexity``): the loss without layer l, all others in place (Kim et al. 2024,
Shortened LLaMA, arXiv:2402.02834, eq. 3). Greedy (``perplexity-greedy``): the layer whose loss is
least goes for good, and the rest are tried again; a layer's score is when it went, so the kept ones
are the last, ordered among themselves by their loss in the last round.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor, torch


@criterion("perplexity", axes="L", needs=("losses_without",))
def perplexity_scores(losses_without: Tensor) -> dict[str, Tensor]:
    """L [L]: the loss without the layer, in nats. ``losses_without`` is [L]."""
    return {"L": losses_without}


@criterion("perplexity-greedy", axes="L", needs=("removed", "last_losses"))
def greedy_scores(removed: Sequence[int], last_losses: Tensor) -> dict[str, Tensor]:
    """L [L]: 0, 1, ... for the removed layers in order, above them the others by their last loss.

    Args:
        removed: layers in the order in which they went.
        last_losses: [L] nats without each layer in the last round; ignored for removed ones.
    """
    scores = torch.zeros(len(last_losses), dtype=torch.float64)
    gone = set(removed)
    kept = sorted((i for i in range(len(scores)) if i not in gone), key=lambda i: last_losses[i])
    for rank, layer in enumerate([*removed, *kept]):
        scores[layer] = rank
    return {"L": scores}
