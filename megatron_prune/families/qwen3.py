"""Qwen3, dense (Yang et al. 2025, arXiv:2505.09388): queries and keys of every head are normalised.

The two norms have ``head_dim`` weights that all heads share, so there is nothing in them to prune;
``head_dim`` stands apart from hidden size and heads. Biases are switched for all of attention
(``attention_bias``); the window is switched as in Qwen2. (modeling_qwen3.py of transformers.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.families.config import interpret
from megatron_prune.families.windows import window_of
from megatron_prune.model.blocks import HALVES, OUTER, attention, gated_mlp
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig


def _read(values: Mapping[str, Any]) -> ModelConfig:
    config, bias = interpret(QWEN3, values), bool(values.get("attention_bias", False))
    return replace(config, qkv_bias=bias, proj_bias=bias)


def _fresh(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.proj_bias}


QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    layer=(*attention(qk_norm=True), *gated_mlp()),
    outer=OUTER,
    halves=HALVES,
    read=_read,
    window=window_of,
    fresh=_fresh,
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
)
