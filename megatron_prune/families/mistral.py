"""Mistral (Jiang et al. 2023, arXiv:2310.06825): Llama with a window in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.families.config import interpret
from megatron_prune.model.blocks import HALVES, OUTER, attention, gated_mlp
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig

_WINDOW = 4096  # where config.json does not say


def _read(values: Mapping[str, Any]) -> ModelConfig:
    return interpret(MISTRAL, values)


def _window(values: Mapping[str, Any]) -> int | None:
    if "layer_types" in values:
        raise CheckpointError(
            "layer_types: transformers 5 reads a mistral with them as a ministral, which this does "
            "not; remove them if all layers have the window"
        )
    window: int | None = values.get("sliding_window", _WINDOW)
    return window


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
    window=_window,
    fresh=_fresh,
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    has_windows=True,
)
