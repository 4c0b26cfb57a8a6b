"""Wanda and FLAP against loops over the columns of transformers' matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.criteria.loops import KINDS, Scored, assert_scores, far, seen

Get = Callable[[str], Scored]


def _columns(one: Scored, linear: Any, size: Callable[[Tensor], Tensor]) -> Tensor:
    """[in]: squared norm of each column of a matrix times the size of the input it meets."""
    x_TI = torch.cat([sample[0] for sample in seen(one, [linear], "input")])
    return torch.stack(
        [linear.weight[:, i].detach().double().norm() ** 2 * size(x_TI[:, i]) for i in
         range(x_TI.shape[1])]
    )  # fmt: skip


def _by_head(one: Scored, size: Callable[[Tensor], Tensor]) -> Tensor:
    columns = [_columns(one, x.self_attn.o_proj, size) for x in one.layers]
    return torch.stack([torch.stack([x[rows].sum() for rows in one.heads]) for x in columns])


def _by_channel(one: Scored, size: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([_columns(one, x.mlp.down_proj, size) for x in one.layers])


def _squares(x: Tensor) -> Tensor:
    return x.norm() ** 2


def _variance(x: Tensor) -> Tensor:
    return x.var(unbiased=False)


@pytest.mark.parametrize("kind", KINDS)
def test_wanda_is_the_norm_of_the_weights_times_that_of_their_inputs(
    kind: str, scored: Get
) -> None:
    one = scored(kind)
    hidden = _columns(one, one.model.lm_head, _squares)
    for layer in one.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
        for linear in readers:
            hidden = hidden + _columns(one, linear, _squares)
    wanted = {
        "D": hidden.sqrt(),
        "Q": _by_head(one, _squares).sqrt(),
        "F": _by_channel(one, _squares).sqrt(),
    }
    assert_scores(one, "wanda", wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_flap_is_the_variance_of_the_inputs_times_the_squared_weights(
    kind: str, scored: Get
) -> None:
    one = scored(kind)
    heads = _by_head(one, _variance)
    groups = heads.unflatten(1, (one.model.config.num_key_value_heads, -1)).sum(2)
    wanted = {"Q": heads, "K": groups, "F": _by_channel(one, _variance)}
    assert_scores(one, "flap", wanted)


def test_the_second_moment_in_flaps_place_would_give_other_scores(scored: Get) -> None:
    """The control: the inputs have a mean that matters."""
    one = scored("gqa")
    tokens = one.ids_WS.numel()
    for axis, found in (("Q", _by_head), ("F", _by_channel)):
        assert far(one.scores[f"flap.{axis}"], found(one, _squares) / tokens) > 0.01
