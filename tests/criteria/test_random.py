"""The random criterion: seeded, independent of everything else, and the same for ever."""

from __future__ import annotations

import torch

from megatron_prune.criteria import CRITERIA
from megatron_prune.criteria.random import random_scores


def test_scores_never_change() -> None:
    """A plan's seed promises the same plan next year: change the stream and this tells."""
    found = random_scores("F", 4, 2, 1234)
    assert found.dtype == torch.float64
    assert found.tolist() == [
        0.2487557198533249, 0.4642772207152204, 0.8977852572862492, 0.2221388108121256,
    ]  # fmt: skip


def test_every_axis_layer_and_seed_has_its_own_stream() -> None:
    places = [("F", 0, 1), ("F", 1, 1), ("Q", 0, 1), ("F", 0, 2), ("D", None, 1)]
    drawn = [random_scores(axis, 8, layer, seed).tolist() for axis, layer, seed in places]
    assert len({tuple(scores) for scores in drawn}) == len(places)


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    torch.manual_seed(0)
    one = random_scores("F", 8, 0, 1)
    after = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), after)
    assert torch.equal(random_scores("F", 8, 0, 1), one)


def test_the_criterion_has_a_name() -> None:
    assert CRITERIA["random"] is random_scores
