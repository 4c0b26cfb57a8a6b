"""Qwen2 and Qwen2.5 (arXiv:2407.10671): Llama with biases on queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.families.config import interpret
from megatron_prune.families.windows import window_of
from megatron_prune.model.blocks import HALVES, OUTER, attention, gated_mlp
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig


def _read(values: Mapping[str, Any]) -> ModelConfig:
    return interpret(QWEN2, values)


QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    layer=(*attention(), *gated_mlp()),
    outer=OUTER,
    halves=HALVES,
    read=_read,
    window=window_of,
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    always_qkv_bias=True,
    head_dim_derived_by=("TGI", "mlx-lm", "vLLM and SGLang (those of 2025)"),
)
