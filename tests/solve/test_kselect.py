"""Selection over ranks, against a stable sort of everything in one place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.solve.kselect import ALONE, kth_smallest, kth_smallest_each, lowest
from tests.sparsity.ranks import on_ranks, split_rows

# few distinct values, so that ties are the rule; subnormals, neighbours in the last bit, infinity
AWKWARD = [0.0, 1e-45, 1e-40, 1.0, float(np.nextafter(np.float32(1), np.float32(2))), 3.5, 255.0]
VALUES = st.sampled_from([*AWKWARD, float("inf")]) | st.floats(0, 2.0**127, width=32)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, list[int]]:
    """Keys [R, I], a number of them, and how many rows each rank has."""
    shares = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any))
    rows, inputs = sum(shares), draw(st.integers(1, 6))
    flat = draw(st.lists(VALUES, min_size=rows * inputs, max_size=rows * inputs))
    # hypothesis gives minus zero too, which keys are not
    keys = torch.tensor(flat, dtype=torch.float32).abs().view(rows, inputs)
    return keys, draw(st.integers(0, keys.numel())), shares


def by_sort(keys: Tensor, k: int) -> Tensor:
    mask = torch.zeros(keys.numel(), dtype=torch.bool)
    mask[keys.flatten().sort(stable=True).indices[:k]] = True
    return mask.view_as(keys)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_exactly_the_first_k_of_a_stable_sort_at_every_dealing(problem) -> None:
    keys, k, shares = problem
    wanted = by_sort(keys, k)
    assert torch.equal(lowest(keys, k), wanted)
    parts = split_rows(keys, shares)
    masks = on_ranks(len(shares), lambda dealt: lowest(parts[dealt.rank], k, dealt))
    assert torch.equal(torch.cat(masks), wanted)


@settings(max_examples=80, deadline=None)
@given(problems(), problems())
def test_the_kth_value_is_that_of_a_sort_at_every_dealing(one, other) -> None:
    shares = one[2]
    keys = [one[0], other[0].flatten().view(-1, 1)]
    places = [min(one[1], keys[0].numel() - 1), min(other[1], keys[1].numel() - 1)]
    wanted = [x.flatten().sort().values[k].item() for x, k in zip(keys, places)]
    assert kth_smallest_each(keys, places) == wanted
    parts = [split_rows(keys[0], shares), split_rows(keys[1], fitted(len(keys[1]), shares))]
    found = on_ranks(
        len(shares), lambda d: kth_smallest_each([p[d.rank] for p in parts], places, d)
    )
    assert found == [wanted] * len(shares)


def fitted(rows: int, shares: list[int]) -> list[int]:
    """A dealing of so many rows: as ``shares`` while they last, what is left to the last rank."""
    ends = [min(sum(shares[: i + 1]), rows) for i in range(len(shares) - 1)]
    return [end - start for start, end in zip([0, *ends], [*ends, rows])]


def test_a_large_matrix_needs_every_byte() -> None:
    draw = torch.Generator().manual_seed(3)
    keys = torch.randn(64, 600, generator=draw).abs()
    k = keys.numel() // 2
    parts = split_rows(keys, [20, 0, 44])
    masks = on_ranks(3, lambda dealt: lowest(parts[dealt.rank], k, dealt))
    assert torch.equal(torch.cat(masks), by_sort(keys, k))
    assert kth_smallest(keys, k) == np.sort(keys.numpy(), axis=None)[k]


@pytest.mark.parametrize("wrong", [-1.0, -0.0, float("nan")])
def test_keys_that_are_no_sizes_are_our_own_mistake(wrong) -> None:
    keys = torch.tensor([[1.0, wrong]])
    with pytest.raises(AssertionError, match="below zero, or no numbers"):
        kth_smallest(keys, 0, ALONE)


def test_a_place_outside_is_our_own_mistake() -> None:
    keys = torch.ones(2, 3)
    with pytest.raises(AssertionError, match="place 6 of 6 keys"):
        kth_smallest(keys, 6)
    parts = split_rows(keys, [1, 1])
    with pytest.raises(AssertionError, match="place 6 of 6 keys"):
        on_ranks(2, lambda dealt: kth_smallest(parts[dealt.rank], 6, dealt))
