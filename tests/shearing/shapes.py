"""A shape with grouped queries, and gates on all of its axes."""

from __future__ import annotations

from dataclasses import replace

from megatron_prune.model.shape import ModelShape
from megatron_prune.shearing.units import gated_axes

SHAPE = ModelShape(
    num_layers=3, hidden_size=10, ffn_hidden_size=12, num_attention_heads=6, num_query_groups=2,
    kv_channels=4, vocab_size=11,
)  # fmt: skip
TARGET = replace(SHAPE, num_layers=2, hidden_size=7, ffn_hidden_size=8, num_attention_heads=4)
AXES = gated_axes(SHAPE, TARGET)
