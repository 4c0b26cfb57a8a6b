"""Weights by a plain loop of the paper's formula; the order of samples by counting them."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
from megatron.core.datasets import helpers

from megatron_prune.data.domains import DomainOrder, UpdateRule, check_rule, updated_weights
from megatron_prune.errors import ConfigError, DamagedError

NAMES = ("web", "code", "books", "wiki")
WEIGHTS = dict(zip(NAMES, (0.6, 0.25, 0.1, 0.05)))
LOSSES = dict(zip(NAMES, (2.5, 1.1, 2.9, 2.0)))
TARGETS = dict(zip(NAMES, (2.3, 1.4, 2.1, 2.0)))


def _plain(eta: float, c: float, clip: bool) -> dict[str, float]:
    raised = {}
    for name in NAMES:
        difference = LOSSES[name] - TARGETS[name]
        if clip:
            difference = max(0.0, difference)
        raised[name] = WEIGHTS[name] * math.exp(eta * difference)
    total = sum(raised.values())
    return {name: (1 - c) * raised[name] / total + c / 4 for name in NAMES}


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("eta", "c"), [(1.0, 1e-4), (0.3, 0.0), (2.0, 0.1)])
def test_weights_are_those_of_a_plain_loop(clip: bool, eta: float, c: float) -> None:
    found = updated_weights(WEIGHTS, LOSSES, TARGETS, UpdateRule(eta=eta, smoothing=c, clip=clip))
    assert found == pytest.approx(_plain(eta, c, clip), abs=1e-15)
    assert found != pytest.approx(_plain(eta, c, not clip), abs=1e-4)
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("floor", "cap"), [(0.1, 0.5), (0.0, 0.4), (0.2, 1.0), (0.25, 0.25)])
def test_bounds_are_kept_and_the_rest_stays_in_proportion(floor: float, cap: float) -> None:
    free = updated_weights(WEIGHTS, LOSSES, TARGETS, UpdateRule())
    found = updated_weights(WEIGHTS, LOSSES, TARGETS, UpdateRule(floor=floor, cap=cap))
    assert math.fsum(found.values()) == pytest.approx(1, abs=1e-12)
    assert all(floor <= weight <= cap for weight in found.values())
    ratios = [found[n] / free[n] for n in NAMES if floor < found[n] < cap]
    assert ratios == pytest.approx(ratios[:1] * len(ratios))
    scale = ratios[0] if ratios else 1.0
    for name in NAMES:  # at a bound only where the bound is what holds it
        if found[name] == floor < cap:
            assert scale * free[name] <= floor + 1e-12
        if found[name] == cap > floor:
            assert scale * free[name] >= cap - 1e-12


@pytest.mark.parametrize(
    ("floor", "cap", "says"),
    [
        (0.3, 1.0, "--domain-weight-floor 0.3: 4 domains would take 1.2 of 1; wanted 0.25 or less"),
        (0.0, 0.2, "--domain-weight-cap 0.2: 4 domains would take 0.8 of 1 at most; wanted 0.25"),
        (0.3, 0.2, "wanted 0 <= floor <= cap <= 1"),
        (0.1, 1.0, "domain wiki: starts with the weight 0.05"),
        (0.0, 0.5, "domain web: starts with the weight 0.6"),
    ],
)
def test_bounds_that_cannot_be_kept_are_refused(floor: float, cap: float, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rule(UpdateRule(floor=floor, cap=cap), WEIGHTS)
    assert says in str(caught.value)


@pytest.mark.parametrize("count", range(2, 40))
def test_the_bound_that_a_refusal_names_is_taken(count: int) -> None:
    """A share such as 1/7, rounded to the wrong side, would be refused again."""
    weights = {str(n): 1 / count for n in range(count)}
    for bounds in ({"floor": 1.0}, {"cap": 1e-9}):
        with pytest.raises(ConfigError) as caught:
            check_rule(UpdateRule(**bounds), weights)
        named = float(re.search("wanted ([0-9.]+) or", str(caught.value))[1])
        check_rule(UpdateRule(**dict.fromkeys(bounds, named)), weights)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_names_its_domain(loss: float) -> None:
    with pytest.raises(DamagedError, match="domain books: its validation loss is"):
        updated_weights(WEIGHTS, {**LOSSES, "books": loss}, TARGETS, UpdateRule())


def test_a_weight_of_zero_and_huge_losses_stay_numbers() -> None:
    weights = {"a": 0.0, "b": 1.0}
    found = updated_weights(
        weights, {"a": 1e4, "b": 1.0}, {"a": 1.0, "b": 1.0}, UpdateRule(smoothing=0.0, floor=0.1)
    )
    assert math.fsum(found.values()) == pytest.approx(1)
    assert min(found.values()) >= 0.1


def _order(sizes: dict[str, int] | None = None) -> DomainOrder:
    return DomainOrder(sizes or {"a": 50, "b": 7, "c": 400, "d": 3}, SHARES[0], seed=3)


SHARES = [
    dict(zip("abcd", weights))
    for weights in ((0.6, 0.25, 0.1, 0.05), (0.1, 0.2, 0.3, 0.4), (0.9, 0.04, 0.04, 0.02))
]


def _draw(order: DomainOrder, first: int, last: int) -> list[tuple[int, int]]:
    found = []
    for sample in range(first, last):
        domain, number = order.locate(sample)
        found.append((domain, order.place(domain, number)))
    return found


def test_a_first_segment_is_megatrons_blend() -> None:
    size = 3000
    dataset, number = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
    weights = np.array(list(SHARES[0].values()))
    helpers.build_blending_indices(dataset, number, weights, 4, size, False)
    order = _order()
    found = [order.locate(sample) for sample in range(size)]
    assert found == list(zip(dataset.tolist(), number.tolist()))


@pytest.mark.parametrize("length", [1, 3, 4, 40, 1500])
def test_counts_are_exact_over_segments(length: int) -> None:
    """Also over segments too short for small weights to be drawn in any one of them."""
    order, expected, counts = _order(), np.zeros(4), Counter[int]()
    for segment in range(30):
        weights = SHARES[segment % 3]
        if segment:
            order.reweight(segment * length, weights)
        for sample in range(segment * length, (segment + 1) * length):
            counts[order.locate(sample)[0]] += 1
        expected += np.array(list(weights.values())) * length
        drawn = order.drawn((segment + 1) * length)
        assert list(drawn.values()) == [counts[i] for i in range(4)]
        assert list(order.expected((segment + 1) * length).values()) == pytest.approx(expected)
        assert np.abs(np.array(list(drawn.values())) - expected).max() < 2


def test_no_sample_repeats_before_its_domain_is_exhausted() -> None:
    order, sizes = _order(), {"a": 50, "b": 7, "c": 400, "d": 3}
    seen: dict[int, list[int]] = {i: [] for i in range(4)}
    for segment in range(6):
        if segment:
            order.reweight(segment * 100, SHARES[segment % 3])
        for domain, place in _draw(order, segment * 100, (segment + 1) * 100):
            seen[domain].append(place)
    for domain, (name, size) in enumerate(sizes.items()):
        epochs = [seen[domain][i : i + size] for i in range(0, len(seen[domain]), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert order.epochs(600)[name] == len(seen[domain]) // size
    assert seen[1][:7] != seen[1][7:14], "every epoch has the same order"


@pytest.mark.parametrize("stop", [1, 99, 100, 101, 1023, 1024, 1500, 2900])
def test_a_restored_order_goes_on_where_it_stopped(stop: int) -> None:
    def walk(order: DomainOrder, first: int, last: int) -> list[tuple[int, int]]:
        found = []
        for sample in range(first, last):
            if sample and sample % 700 == 0 and order._start != sample:
                order.reweight(sample, SHARES[sample // 700 % 3])
            found += _draw(order, sample, sample + 1)
        return found

    whole = _order()
    expected = walk(whole, 0, 3000)
    half, other = _order(), _order()
    walk(half, 0, stop)
    half.locate(stop + 300)  # looked ahead, as a loader may
    other.restore(half.state(stop))
    assert walk(other, stop, 3000) == expected[stop:]
    assert other.state(3000) == whole.state(3000)


@pytest.mark.parametrize(
    ("sizes", "seed", "says"),
    [
        ({"a": 50, "b": 8, "c": 400, "d": 3}, 3, "samples an epoch of b 7, now 8"),
        ({"a": 50, "b": 7, "c": 400, "e": 3}, 3, "d 3, now none, e none, now 3"),
        ({"b": 7, "a": 50, "c": 400, "d": 3}, 3, "in the order a, b, c, d, now b, a, c, d"),
        ({"a": 50, "b": 7, "c": 400, "d": 3}, 4, "seed 3, now 4"),
    ],
)
def test_another_order_is_not_taken_up(sizes: dict[str, int], seed: int, says: str) -> None:
    weights = dict.fromkeys(sizes, 0.25)
    with pytest.raises(ConfigError) as caught:
        DomainOrder(sizes, weights, seed).restore(_order().state(10))
    assert says in str(caught.value)


def test_an_empty_domain_is_named() -> None:
    with pytest.raises(ConfigError, match="domain b: no sample to train on"):
        DomainOrder({"a": 1, "b": 0}, {"a": 0.5, "b": 0.5}, 1)
