"""The axis table against transformers' own models: names, shapes and counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.families import FAMILIES, read_config
from megatron_prune.families.config import hf_name
from megatron_prune.model.axes import axes_of, count_parameters, names, split_dim, tensor_shape
from megatron_prune.model.costs import weight_bytes
from megatron_prune.model.family import Family
from megatron_prune.model.shape import AXES, LAYER_AXES, SCORED_AXES
from tests import pico


@pytest.mark.parametrize("kind", sorted(pico.KINDS))
def test_the_table_names_every_tensor_of_a_model_with_its_shape(
    kind: str, models: Callable[[str], Path]
) -> None:
    config = read_config(models(kind) / "config.json")
    found = {name: tuple(x.shape) for name, x in pico.tensors(models(kind)).items()}
    assert {
        hf_name(n, config.family): tensor_shape(n, config.shape) for n in names(config)
    } == found
    parameters = sum(x.numel() for x in pico.tensors(models(kind)).values())
    assert count_parameters(config) == parameters
    assert weight_bytes(config) == sum(x.nbytes for x in pico.tensors(models(kind)).values())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
def test_a_canonical_name_means_the_same_axes_in_every_family(family: Family) -> None:
    """`axes_of` need not know whose weight it is asked for; and every norm of a half is one."""
    weights = (*family.layer, *family.outer)
    assert len({weight.name for weight in weights}) == len(weights)
    assert all(axes_of(weight.name) == weight.axes for weight in weights)
    per_layer = {weight.name for weight in family.layer}
    for half in family.halves:
        needed = (half.norm, half.output, *half.inputs)
        assert {f"{module}.weight" for module in needed} <= per_layer


def test_the_letters_are_sizes_of_the_shape(models: Callable[[str], Path]) -> None:
    shape = read_config(models("gqa") / "config.json").shape
    assert {axis.size for axis in AXES.values()} == {*shape.as_dict()}
    assert {axis: shape.rows(axis) for axis in AXES} == {
        **dict.fromkeys("VDFLC", 1),
        **dict.fromkeys("QK", shape.kv_channels),
    }
    assert (SCORED_AXES, LAYER_AXES) == ("DQKFL", "QKF")


def test_tensor_parallelism_splits_rows_of_columns_and_columns_of_rows() -> None:
    layer = "decoder.layers.3."
    assert axes_of(layer + "self_attention.linear_q.weight") == "QD" and split_dim("QD") == 0
    assert axes_of(layer + "self_attention.linear_proj.weight") == "DQ" and split_dim("DQ") == 1
    assert axes_of(layer + "mlp.linear_fc2.weight") == "DF" and split_dim("DF") == 1
    assert axes_of("embedding.word_embeddings.weight") == "VD" and split_dim("VD") == 0
    assert split_dim(axes_of(layer + "mlp.linear_fc2.bias")) is None
