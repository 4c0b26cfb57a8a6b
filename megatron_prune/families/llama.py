"""Llama (Touvron et al. 2023, arXiv:2302.13971, and after): what most families are compared with.

transformers' ``LlamaConfig`` switches the biases of attention and MLP apart. With layers of
different FFN widths it is written as a Nemotron-NAS model (`block_configs`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.families.block_configs import width_keys
from megatron_prune.families.config import interpret
from megatron_prune.model.blocks import HALVES, OUTER, attention, gated_mlp
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig


def _read(values: Mapping[str, Any]) -> ModelConfig:
    bias = bool(values.get("attention_bias", False))
    return replace(
        interpret(LLAMA, values),
        qkv_bias=bias,
        proj_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False)),
    )


def _fresh(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.proj_bias, "mlp_bias": config.mlp_bias}


LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    layer=(*attention(), *gated_mlp()),
    outer=OUTER,
    halves=HALVES,
    read=_read,
    fresh=_fresh,
    write_widths=width_keys,
    defaults={"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048},
    hidden_multiple_of_heads=True,
    head_dim_derived_by=("TGI",),
)
