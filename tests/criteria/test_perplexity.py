"""Perplexity, one-shot and greedy, against transformers' model with layers taken out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_prune.criteria.perplexity import greedy_scores
from tests.criteria.loops import (
    KINDS,
    REMOVAL_LAYERS,
    REMOVAL_SAMPLES,
    Scored,
    assert_scores,
    far,
)

Get = Callable[[str], Scored]


@torch.no_grad()
def _loss(one: Scored, gone: list[int]) -> float:
    """Mean over the removal samples, without some layers."""
    whole = one.model.model.layers
    kept = [layer for number, layer in enumerate(whole) if number not in gone]
    one.model.model.layers = torch.nn.ModuleList(kept)
    try:
        losses = [
            float(one.model(x[None], labels=x[None], use_cache=False).loss)
            for x in one.ids_WS[:REMOVAL_SAMPLES]
        ]
    finally:
        one.model.model.layers = whole
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_loss_without_it(kind: str, scored: Get) -> None:
    one = scored(kind)
    losses = [_loss(one, [layer]) for layer in range(len(one.layers))]
    assert_scores(one, "perplexity", {"L": torch.tensor(losses)})


def test_the_loss_of_the_whole_model_is_another(scored: Get) -> None:
    one = scored("gqa")
    found = one.scores["perplexity.L"]
    assert far(found, torch.full_like(found, _loss(one, []))) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_greedily_the_layer_that_costs_least_goes_first(kind: str, scored: Get) -> None:
    one = scored(kind)
    order: list[int] = []
    losses: dict[int, float] = {}
    for _ in range(REMOVAL_LAYERS):
        left = [layer for layer in range(len(one.layers)) if layer not in order]
        losses = {layer: _loss(one, [*order, layer]) for layer in left}
        order.append(min(losses, key=lambda layer: losses[layer]))
    rest = sorted(set(losses) - set(order), key=lambda layer: losses[layer])
    wanted = {layer: float(rank) for rank, layer in enumerate([*order, *rest])}
    found = one.scores["perplexity-greedy.L"]
    assert found.tolist() == [wanted[layer] for layer in range(len(one.layers))]


def test_those_that_stay_are_above_those_that_went_by_their_last_loss() -> None:
    losses = torch.tensor([3.0, torch.inf, 1.0, 2.0, 9.0])
    assert greedy_scores([1, 2], losses)["L"].tolist() == [3.0, 0.0, 1.0, 2.0, 4.0]
