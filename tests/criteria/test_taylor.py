"""Taylor and Fisher against transformers' gradients, one sample after the other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.criteria.loops import KINDS, SAMPLES, Scored, assert_scores, far, unit_sums


def _changes(one: Scored) -> list[dict[str, Tensor]]:
    """weight x gradient of every parameter, one dict a sample."""
    found = []
    for ids_S in one.ids_WS:
        one.model.zero_grad()
        one.model(ids_S[None], labels=ids_S[None]).loss.backward()
        found.append({n: x.detach() * x.grad for n, x in one.model.named_parameters()})
    one.model.zero_grad()
    return found


def _mean_over_samples(one: Scored, sizes: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    wanted: dict[str, Tensor] = {}
    for changes in _changes(one):
        sums = unit_sums(one, {name: sizes(x) for name, x in changes.items()})
        for axis, x in sums.items():
            wanted[axis] = wanted.get(axis, 0) + x / SAMPLES
    return wanted


@pytest.mark.parametrize("kind", KINDS)
def test_taylor_is_the_sum_of_weight_times_gradient(
    kind: str, scored: Callable[[str], Scored]
) -> None:
    one = scored(kind)
    assert_scores(one, "taylor", _mean_over_samples(one, lambda x: x.abs()))


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_sum_of_its_squares(kind: str, scored: Callable[[str], Scored]) -> None:
    one = scored(kind)
    assert_scores(one, "fisher", _mean_over_samples(one, lambda x: x.square()))


def test_gradients_summed_over_the_samples_would_give_other_scores(
    scored: Callable[[str], Scored],
) -> None:
    """The control: opposite gradients of two samples cancel in a sum."""
    one = scored("gqa")
    summed: dict[str, Tensor] = {}
    for changes in _changes(one):
        for name, x in changes.items():
            summed[name] = summed.get(name, 0) + x / SAMPLES
    sums = unit_sums(one, {name: x.abs() for name, x in summed.items()})
    for axis, x in sums.items():
        assert far(one.scores[f"taylor.{axis}"], x) > 0.05, axis
