"""Costs against counts of a real model's matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_prune.budget import flops_per_token, kv_cache_bytes_per_token, training_memory
from megatron_prune.grid import ParallelGrid
from megatron_prune.store.hf_config import read_config
from tests import pico

Models = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["gqa", "mha", "four", "tied"])
def test_forward_flops_are_two_a_weight_of_every_matrix_and_causal_attention(
    kind: str, models: Models
) -> None:
    config, seq_length = read_config(models(kind) / "config.json"), 64
    found = pico.tensors(models(kind))
    embedding = found["model.embed_tokens.weight"].numel()
    matrices = sum(x.numel() for x in found.values() if x.ndim == 2)
    matrices -= 0 if config.tied else embedding  # looked up, not multiplied
    width = config.shape.num_attention_heads * config.shape.kv_channels
    attention = 2 * 2 * width * seq_length / 2 * config.shape.num_layers
    assert flops_per_token(config, seq_length) == 2 * matrices + attention


def test_the_cache_of_a_token_is_its_keys_and_values(models: Models) -> None:
    config = read_config(models("gqa") / "config.json")
    assert kv_cache_bytes_per_token(config) == 4 * 2 * 3 * 8 * 4
    assert kv_cache_bytes_per_token(replace(config, dtype="bf16")) == 4 * 2 * 3 * 8 * 2


def test_the_heaviest_stage_of_uneven_ones_counts(models: Models) -> None:
    config = read_config(models("gqa") / "config.json")
    even = training_memory(config, ParallelGrid(pipeline_parallel=2))
    uneven = training_memory(config, ParallelGrid(pipeline_parallel=2, first_stage_layers=1))
    assert uneven.parameters > even.parameters
