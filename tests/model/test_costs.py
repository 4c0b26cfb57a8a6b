"""Costs against counts of a real model's matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.families import read_config
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.costs import (
    flops_at,
    kv_cache_bytes_per_token,
    parameters_at,
    serving_bytes,
    sizes_of,
)
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
    assert flops_at(config, sizes_of(config.shape), seq_length) == 2 * matrices + attention


def test_the_cache_of_a_token_is_its_keys_and_values(models: Models) -> None:
    config = read_config(models("gqa") / "config.json")
    assert kv_cache_bytes_per_token(config) == 4 * 2 * 3 * 8 * 4
    assert kv_cache_bytes_per_token(replace(config, dtype="bf16")) == 4 * 2 * 3 * 8 * 2


@pytest.mark.parametrize("kind", ["gqa", "tied", "all_bias", "qwen"])
def test_costs_of_many_shapes_at_once_are_those_of_each(kind: str, models: Models) -> None:
    config = read_config(models(kind) / "config.json")
    shapes = [
        config.shape,
        replace(config.shape, num_layers=2, hidden_size=40, num_attention_heads=3),
        replace(config.shape, ffn_hidden_size=7, num_attention_heads=4, num_query_groups=2),
    ]
    sizes = {axis: np.array([shape.size(axis) for shape in shapes]) for axis in "VDQKFL"}
    each = [replace(config, shape=shape) for shape in shapes]
    assert parameters_at(config, sizes).tolist() == [count_parameters(one) for one in each]
    assert flops_at(config, sizes, 64).tolist() == [
        flops_at(one, sizes_of(one.shape), 64) for one in each
    ]


def test_serving_takes_weights_cache_activations_and_logits(models: Models) -> None:
    config = read_config(models("gqa") / "config.json")  # D 48, Q 6, K 3 of 8, F 96, L 4, V 379
    weights = sum(x.numel() for x in pico.tensors(models("gqa")).values())
    cache = 2 * 4 * 3 * 8 * 5 * 1000
    activations = (2 * 48 + 3 * 96) * 5000
    wanted = 2 * (weights + cache + activations) + 4 * 379 * 5
    how = {"batch_size": 5, "dtype": "bf16"}
    assert serving_bytes(config, sizes_of(config.shape), seq_length=1000, **how) == wanted
    narrow = {**sizes_of(config.shape), "F": 12}  # attention is the wider one
    wanted = 2 * (weights - 4 * 3 * 84 * 48 + cache + (2 * 48 + 2 * 9 * 8) * 5000) + 4 * 379 * 5
    assert serving_bytes(config, narrow, seq_length=1000, **how) == wanted
    longer = serving_bytes(config, sizes_of(config.shape), seq_length=2000, **how)
    cut = (2 * 48 + 3 * 96) * 8192  # a prompt goes through in parts
    assert longer == 2 * (weights + 2 * cache + cut) + 4 * 379 * 5
