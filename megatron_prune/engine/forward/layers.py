"""The two modules Megatron's local spec lacks without Apex and Transformer Engine.

Shape suffixes: s sequence, b batch, h heads of this rank, d kv_channels, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_prune.engine.forward.context import in_order


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Each query sees the keys up to its own; the last query's is the last."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    seen, mask = k.shape[2] - q.shape[2], None
    if seen:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(seen)
    out_bhsd = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=not seen and q.shape[2] > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out_bhsd.permute(2, 0, 1, 3).flatten(2)


class SdpaAttention(torch.nn.Module):
    """Causal attention by torch's fused kernel.

    Builds no mask; but under context parallelism, where every rank gathers the keys and values of
    whole sequences, one of [S / 2 CP, up to S] booleans for each of its two chunks.
    """

    def __init__(self, *, pg_collection: Any, **_: Any) -> None:
        super().__init__()
        self._group: ProcessGroup = pg_collection.cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query_sbhd, key and value with fewer heads under GQA -> [s, b, h * d]."""
        parts = self._group.size()
        if parts == 1:
            return _attend(query, key, value)
        keys, values = (in_order(x, self._group) for x in (key, value))
        size = len(query) // 2
        rank = self._group.rank()
        ends = (rank + 1) * size, (2 * parts - rank) * size
        return torch.cat(
            [_attend(q, keys[:end], values[:end]) for q, end in zip(query.chunk(2), ends)]
        )


class RMSNorm(torch.nn.Module):
    """RMSNorm whose weight takes part in sequence parallelism.

    `sequence_parallel` on the weight makes `finalize_model_grads` sum its gradient over the
    tensor-parallel ranks, each of which has seen a part of the sequence only.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x_sbD: Tensor) -> Tensor:
        return F.rms_norm(x_sbD, self.weight.shape, self.weight, self.eps)
