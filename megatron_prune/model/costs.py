"""What a model costs: parameters, bytes, FLOPs. Formulas only.

Counts follow the axis table, so they hold for every shape, pruned or not. The functions that take
`Sizes` answer for one shape or, with arrays, for a million at once (`search`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from megatron_prune.model.axes import count_parameters, layer_weights, outer_weights
from megatron_prune.model.lazy import np
from megatron_prune.model.shape import AXES, ModelConfig, ModelShape

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
PREFILL_TOKENS = 8192  # that go through a layer at once: vLLM's usual max_num_batched_tokens

Sizes = Mapping[str, Any]
"""Axis letter -> indices along it: integers, or int64 arrays of one length. An axis that is missing
has the size that the model has."""


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """One shape as `Sizes`."""
    return {axis: shape.size(axis) for axis in AXES}


def parameters_at(config: ModelConfig, sizes: Sizes) -> Any:
    """`count_parameters` of ``config`` in other sizes; an array where they are."""

    def count(weights: list[Any]) -> Any:
        total: Any = 0
        for axes, number in Counter("".join(sorted(weight.axes)) for weight in weights).items():
            product: Any = number
            for axis in axes:
                size = sizes[axis] if axis in sizes else config.shape.size(axis)
                product = product * size * config.shape.rows(axis)
            total = total + product
        return total

    return sizes["L"] * count(layer_weights(config)) + count(outer_weights(config))


def serving_bytes(
    config: ModelConfig, sizes: Sizes, *, seq_length: int, batch_size: int, dtype: str
) -> Any:
    """Memory that ``batch_size`` sequences of ``seq_length`` tokens need, all ranks together.

    weights + KV cache + activations, each value in ``dtype``:

        weights      parameters
        KV cache     2 L K kv_channels  x  batch_size seq_length
        activations  (2 D + max(3 F, 2 (Q + K) kv_channels))  x  T   one layer at a time: the
                     residual and its norm; gate, up and product (2 F without a gate), or q, k, v
                     and what they attend to
        logits       V x batch_size, of each sequence's last token, in fp32

    with T = min(batch_size seq_length, PREFILL_TOKENS), as engines cut long prompts. What the
    framework itself takes (CUDA context, workspaces, fragmentation: 1 to 3 GB on a GPU) is not in
    it.
    """
    tokens, width = batch_size * seq_length, config.shape.kv_channels
    cache = 2 * sizes["L"] * sizes["K"] * width * tokens
    widest = np.maximum(
        config.family.ffn_matrices * sizes["F"], 2 * (sizes["Q"] + sizes["K"]) * width
    )
    activations = (2 * sizes["D"] + widest) * min(tokens, PREFILL_TOKENS)
    values = parameters_at(config, sizes) + cache + activations
    return values * DTYPE_BYTES[dtype] + sizes["V"] * batch_size * DTYPE_BYTES["fp32"]


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the weights in the model's dtype."""
    return count_parameters(config) * DTYPE_BYTES[config.dtype]


def flops_at(config: ModelConfig, sizes: Sizes, seq_length: int) -> Any:
    """Forward multiply-adds x 2 a token: every matrix, and causal attention over half a sequence.

    Training costs three times this (Kaplan et al. 2020, arXiv:2001.08361, eq. 2.2). An array where
    the sizes are.
    """
    width = config.shape.kv_channels
    projections = sizes["D"] * width * 2 * (sizes["Q"] + sizes["K"])
    attention = sizes["Q"] * width * seq_length  # q.k and p.v, halved
    ffn = config.family.ffn_matrices * sizes["D"] * sizes["F"]
    per_layer = projections + ffn + attention
    return 2 * (sizes["L"] * per_layer + sizes["V"] * sizes["D"])


def kv_cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token of context takes while generating."""
    shape = config.shape
    width = shape.num_query_groups * shape.kv_channels
    return 2 * shape.num_layers * width * DTYPE_BYTES[config.dtype]
