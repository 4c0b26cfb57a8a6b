"""Random scores: the baseline every criterion has to beat."""

from __future__ import annotations

import hashlib

from megatron_prune.criteria.registry import criterion
from megatron_prune.model.lazy import Tensor, torch


@criterion("random", axes="DQKFL")
def random_scores(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
    """Independent uniform scores for one axis of one layer.

    The stream is seeded by (seed, axis, layer), so what is drawn for one axis does not depend on
    which others are pruned, on the number of ranks, or on the order of the calls.

    Returns:
        [size] float64 in [0, 1).
    """
    digest = hashlib.sha256(f"{seed}/{axis}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(size, generator=generator, dtype=torch.float64)
