"""Fused storage against plain lists, and every way into it against the others."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.families import FAMILIES
from megatron_prune.model.axes import layer_weights, split_dim, tensor_shape
from megatron_prune.model.fusion import (
    fused_of,
    join,
    megatron_name,
    parts_of,
    piece,
    split,
    stored_name,
    stored_shape,
)
from megatron_prune.model.grid import part_range
from megatron_prune.model.shape import ModelConfig, ModelShape

SIZES = st.integers(1, 4)


def config(groups: int = 2, per_group: int = 2, channels: int = 1, ffn: int = 3) -> ModelConfig:
    shape = ModelShape(
        num_layers=1,
        hidden_size=5,
        ffn_hidden_size=ffn,
        num_attention_heads=groups * per_group,
        num_query_groups=groups,
        kv_channels=channels,
        vocab_size=7,
    )
    return ModelConfig(
        family=FAMILIES["qwen2"], shape=shape, tied=True, qkv_bias=True, hf_config={}
    )


QKV, FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def test_linear_qkv_lies_as_megatron_lays_it() -> None:
    """Per query group: its q heads, then k, then v. Two groups of two heads, one channel each."""
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    parts = parts_of(QKV, config())
    assert [part.split(".")[1] for part in parts] == ["linear_q", "linear_k", "linear_v"]
    found = join([q, k, v], parts[0], config().shape)
    assert found.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_linear_fc1_holds_gate_and_then_up() -> None:
    gate, up = torch.tensor([0, 1, 2]), torch.tensor([10, 11, 12])
    parts = parts_of(FC1, config())
    assert join([gate, up], parts[0], config().shape).tolist() == [0, 1, 2, 10, 11, 12]
    assert parts == ["mlp.linear_gate.weight", "mlp.linear_up.weight"]


@given(SIZES, SIZES, SIZES, SIZES, st.sampled_from(["weight", "bias"]))
def test_split_takes_apart_what_join_joins(
    groups: int, per_group: int, channels: int, ffn: int, kind: str
) -> None:
    model = config(groups, per_group, channels, ffn)
    for stored in (QKV, FC1):
        rest = stored.replace("weight", kind)
        parts = parts_of(rest, model)
        if parts == [rest]:
            continue  # Qwen2 has no bias there
        values = [torch.randn(tensor_shape(part, model.shape)) for part in parts]
        fused = join(values, parts[0], model.shape)
        for part, value in zip(parts, values, strict=True):
            sizes = tensor_shape(part, model.shape)
            assert fused.shape == stored_shape(part, sizes, model.shape)
            assert torch.equal(split(fused, part, model.shape), value)


@given(SIZES, SIZES, SIZES, st.integers(1, 3), st.data())
def test_pieces_of_blocks_are_the_parts_of_the_whole(
    groups: int, per_group: int, channels: int, ffn: int, data: st.DataObject
) -> None:
    """However the stored tensor is cut between groups, the pieces hold all rows once."""
    model = config(groups, per_group, channels, ffn)
    for weight in layer_weights(model):
        dim = split_dim(weight.axes)
        if dim is None:
            continue
        names = parts_of(stored_name(weight.name), model)
        values = {name: torch.randn(tensor_shape(name, model.shape)) for name in names}
        whole = join(list(values.values()), names[0], model.shape)
        fused = fused_of(weight.name)
        by_group = fused is not None and fused.by_group
        step = (per_group + 2) * channels if by_group else model.shape.rows(weight.axes[dim])
        cuts = data.draw(st.sets(st.integers(0, whole.shape[dim] // step)))
        places = sorted({0, whole.shape[dim], *(cut * step for cut in cuts)})
        found = []
        for begin, end in pairwise(places):
            block = whole.narrow(dim, begin, end - begin)
            part = piece(lambda block=block: block, weight.name, begin, end - begin, model.shape)
            if part is not None:
                found.append((part.start, part.load(0, part.stop - part.start)))
        joined = torch.cat([x for _, x in sorted(found, key=lambda one: one[0])], dim)
        assert torch.equal(joined, values[weight.name])


def test_a_block_cut_inside_a_query_group_is_refused() -> None:
    with pytest.raises(ValueError, match="linear_qkv is cut inside a query group"):
        piece(lambda: torch.zeros(2), "self_attention.linear_q.weight", 0, 2, config().shape)


def test_transformer_engine_names_a_norm_after_the_linear_behind_it() -> None:
    for norm, fused in (
        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ):
        assert megatron_name(norm, te_norms=True) == fused
        assert megatron_name(norm, te_norms=False) == norm


def test_fusing_each_ranks_groups_is_fusing_all_and_splitting_for_every_legal_size() -> None:
    for groups in range(1, 17):
        model = config(groups, per_group=2)
        q, k, v = (
            torch.arange(n) + at for n, at in ((2 * groups, 0), (groups, 100), (groups, 200))
        )
        first, shape = parts_of(QKV, model)[0], model.shape
        whole = join([q, k, v], first, shape)
        for tp in (n for n in range(1, 17) if groups % n == 0):
            ranges = [part_range(groups, rank, tp) for rank in range(tp)]
            parts = [join([q[2 * a : 2 * b], k[a:b], v[a:b]], first, shape) for a, b in ranges]
            assert torch.equal(torch.cat(parts), whole)
            assert len({len(part) for part in parts}) == 1
