"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a window in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.families.config import interpret
from megatron_prune.model.blocks import HALVES, OUTER, attention, gated_mlp
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig


def _read(values: Mapping[str, Any]) -> ModelConfig:
    return interpret(MISTRAL, values)


def _fresh(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.sliding_window}


MISTRAL = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    layer=(*attention(), *gated_mlp()),
    outer=OUTER,
    halves=HALVES,
    read=_read,
    fresh=_fresh,
    defaults={
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    has_windows=True,
)
