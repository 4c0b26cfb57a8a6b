"""Nemotron-NAS (DeciLM): Llama's modules, with layers of different sizes (`block_configs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.families.block_configs import ARCHITECTURE, MODEL_TYPE, read_block_configs
from megatron_prune.families.llama import LLAMA
from megatron_prune.model.shape import ModelConfig


def _read(values: Mapping[str, Any]) -> ModelConfig:
    _ = values["num_attention_heads"]  # is missed first
    widths, groups = read_block_configs(values)
    sizes = {"intermediate_size": max(widths), "num_key_value_heads": groups}
    config = LLAMA.read({**values, **sizes})
    differ = widths if len(set(widths)) > 1 else None
    shape = replace(config.shape, ffn_per_layer=differ)
    return replace(config, shape=shape, hf_config=dict(values))


NEMOTRON_NAS = replace(LLAMA, model_type=MODEL_TYPE, architecture=ARCHITECTURE, read=_read)
"""How it lies on disk; what is read from it is a model of family llama."""
