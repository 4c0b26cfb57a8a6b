"""Sizes of a model: what is no shape, and which tensor-parallel sizes divide one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_prune.errors import ShapeError
from megatron_prune.model.shape import ModelShape

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=379,
)
ALL = [(heads, groups) for heads in range(1, 17) for groups in range(1, 17)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0; wanted a positive integer"),
        ({"hidden_size": -48}, "hidden_size is -48"),
        ({"kv_channels": 8.0}, "kv_channels is 8.0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"ffn_hidden_size": "96"}, "ffn_hidden_size is '96'"),
        ({"num_query_groups": 4}, "num_attention_heads 6 is not a multiple of num_query_groups 4"),
    ],
)
def test_sizes_that_are_no_model_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(SHAPE, **change)


def test_shape_survives_its_dict_and_refuses_other_keys() -> None:
    assert ModelShape.from_dict(SHAPE.as_dict()) == SHAPE
    with pytest.raises(ShapeError, match=r"missing \['vocab_size'\], unknown \['vocab'\]"):
        values = SHAPE.as_dict()
        ModelShape.from_dict({"vocab": values.pop("vocab_size"), **values})


def test_heads_and_groups_from_1_to_16_are_a_shape_exactly_when_groups_divide_heads() -> None:
    for heads, groups in ALL:
        if heads % groups:
            with pytest.raises(ShapeError, match=f"{heads} is not a multiple .* {groups}"):
                replace(SHAPE, num_attention_heads=heads, num_query_groups=groups)
        else:
            shape = replace(SHAPE, num_attention_heads=heads, num_query_groups=groups)
            assert shape.heads_per_group * groups == heads


def test_every_tensor_parallel_size_from_1_to_16_divides_or_is_refused_with_those_that_do() -> None:
    """Fewer groups than ranks is refused, not replicated: `reshard` takes a smaller size."""
    for heads, groups in ALL:
        if heads % groups:
            continue
        shape = replace(
            SHAPE, num_attention_heads=heads, num_query_groups=groups, ffn_hidden_size=720720
        )
        legal = [n for n in range(1, 17) if heads % n == 0 and groups % n == 0]
        assert shape.legal_tensor_parallel_sizes() == legal
        for tp in range(1, 17):
            if tp in legal:
                shape.check_tensor_parallel(tp)
                continue
            with pytest.raises(ShapeError) as caught:
                shape.check_tensor_parallel(tp)
            message = str(caught.value)
            assert f"tensor-model-parallel-size {tp} does not divide" in message
            assert message.endswith("legal for this shape: " + ", ".join(map(str, legal)))


WIDTHS = (96, 24, 60, 96)


def test_layers_of_different_widths_have_the_widest_as_their_size() -> None:
    shape = replace(SHAPE, ffn_per_layer=WIDTHS)
    assert [shape.size("F", layer) for layer in range(4)] == list(WIDTHS) == list(shape.ffn_widths)
    assert shape.size("F") == 96 and shape.size("D", 1) == 48
    assert SHAPE.ffn_widths == (96,) * 4
    assert ModelShape.from_dict(shape.as_dict()) == shape
    assert shape.as_dict() == {**SHAPE.as_dict(), "ffn_per_layer": list(WIDTHS)}
    assert "ffn_per_layer" not in SHAPE.as_dict()


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((96, 24, 60), "wanted 4 widths, one a layer"),
        ((96,) * 4, "that are not all the same"),
        ((), "wanted 4 widths"),
        ((48, 24, 60, 48), "ffn_hidden_size is 96; wanted 60, the widest"),
        ((96, 0, 60, 96), "ffn_per_layer is 0; wanted a positive integer"),
        ((96, 24.0, 60, 96), "ffn_per_layer is 24.0"),
    ],
)
def test_widths_that_are_none_are_refused(widths: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        replace(SHAPE, ffn_per_layer=widths)


def test_tensor_parallelism_has_to_divide_every_layers_width() -> None:
    shape = replace(SHAPE, ffn_per_layer=WIDTHS)
    assert shape.legal_tensor_parallel_sizes() == [1, 3]
    with pytest.raises(ShapeError, match="3 does not divide ffn_per_layer's .* divisor 4; .*: 1$"):
        replace(SHAPE, ffn_per_layer=(96, 24, 60, 40)).check_tensor_parallel(3)


def test_ffn_limits_the_tensor_parallel_size_too() -> None:
    with pytest.raises(ShapeError, match="3 does not divide ffn_hidden_size 50; .* shape: 1$"):
        replace(SHAPE, ffn_hidden_size=50).check_tensor_parallel(3)
