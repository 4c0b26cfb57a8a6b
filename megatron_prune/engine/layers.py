"""The two modules Megatron's local spec lacks without Apex and Transformer Engine.

Shape suffixes: s sequence, b batch, h heads of this rank, d kv_channels, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SdpaAttention(torch.nn.Module):
    """Causal attention by torch's fused kernel; never builds the mask."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """query_sbhd, key and value with fewer heads under GQA -> [s, b, h * d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out_bhsd = F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out_bhsd.permute(2, 0, 1, 3).flatten(2)


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
