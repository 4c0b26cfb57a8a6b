"""Activation against loops over samples, norms, layers and units on transformers' model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.criteria.loops import KINDS, Scored, assert_scores, far, seen

Get = Callable[[str], Scored]


def _means(one: Scored, modules: list[object], what: str) -> torch.Tensor:
    """[modules, n]: sum over samples of (mean over the sequence of |x|)^2."""
    found = []
    for number in range(len(modules)):
        total = torch.zeros(())
        for sample in seen(one, modules, what):
            total = total + sample[number].abs().mean(0) ** 2
        found.append(total)
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_is_how_much_it_moves(kind: str, scored: Get) -> None:
    one = scored(kind)
    heads = _means(one, [x.self_attn.o_proj for x in one.layers], "input")
    ffn = _means(one, [x.mlp.down_proj for x in one.layers], "input")
    hidden, layers = _means(one, one.norms, "output"), torch.zeros(len(one.layers)).double()
    before, after = seen(one, one.layers, "input"), seen(one, one.layers, "output")
    for layer in range(len(one.layers)):
        cosines = [
            float(x @ y / (x.norm() * y.norm()))
            for sample_in, sample_out in zip(before, after)
            for x, y in zip(sample_in[layer], sample_out[layer])
        ]
        layers[layer] = 1 - sum(cosines) / len(cosines)
    wanted = {
        "D": torch.stack([norm.sqrt() for norm in hidden[:-1]]).sum(0),
        "Q": torch.stack([heads[:, rows].sum(1).sqrt() for rows in one.heads], 1),
        "F": ffn.sqrt(),
        "L": layers,
    }
    assert_scores(one, "activation", wanted)


def test_what_goes_into_a_norm_would_give_other_scores(scored: Get) -> None:
    """The control, and the trap: a hook on Transformer Engine's fused module sees the input."""
    one = scored("gqa")
    inputs = _means(one, one.norms, "input")[:-1].sqrt().sum(0)
    assert far(one.scores["activation.D"], inputs) > 0.1
    assert inputs.argsort().tolist() != one.scores["activation.D"].argsort().tolist()
