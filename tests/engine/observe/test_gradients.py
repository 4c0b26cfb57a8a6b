"""Sizes of weight x gradient: multiplied in float32 whatever the model's dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prune.criteria.observed import UnitSums
from megatron_prune.engine.forward.model import ModelOptions, build_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import model_parallel
from megatron_prune.engine.observe import gradients
from megatron_prune.errors import DamagedError
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.store import open_source
from tests.engine.conftest import token_ids

Models = Callable[[str], Path]
SEQ = 24


def test_a_bf16_models_products_are_not_rounded_to_bf16(models: Models) -> None:
    with model_parallel(ParallelGrid()) as groups:
        source = open_source(models("bf16"))
        config = source.config
        model = build_model(config, groups, ModelOptions(seq_length=SEQ, dtype="bf16")).train()
        load_weights(model, source, groups)
        gradients._backward(model, token_ids(379, rows=1, length=SEQ))
        first, second = UnitSums(config.shape), UnitSums(config.shape)
        gradients._add(model, config, groups, first, second, [])
        mlp = model.decoder.layers[1].mlp
        parts = (
            (mlp.linear_fc1.weight[:96], 1), (mlp.linear_fc1.weight[96:], 1),
            (mlp.linear_fc2.weight, 0),
        )  # fmt: skip
        grads = (
            mlp.linear_fc1.weight.grad[:96],
            mlp.linear_fc1.weight.grad[96:],
            mlp.linear_fc2.weight.grad,
        )
        wanted = torch.stack(
            [(w.double() * g.double()).abs().sum(d) for (w, d), g in zip(parts, grads)]
        ).sum(0)
    assert float((first.units()["F"][1] - wanted).abs().max() / wanted.max()) < 1e-6


def test_a_gradient_that_is_not_finite_is_named(models: Models) -> None:
    with model_parallel(ParallelGrid()) as groups:
        source = open_source(models("gqa"))
        model = build_model(source.config, groups, ModelOptions(seq_length=SEQ))
        load_weights(model, source, groups)
        model.decoder.layers[2].mlp.linear_fc2.weight.data[3, 4] = torch.nan
        with pytest.raises(DamagedError, match="the gradient of .* is not finite"):
            gradients.unit_gradients(model, source.config, token_ids(379, 2, SEQ), groups)
