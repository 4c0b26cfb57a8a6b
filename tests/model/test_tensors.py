"""`take` and fused storage against plain loops."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.tensors import expand_rows, fuse_qkv, take, unfuse_qkv

SIZES = st.integers(1, 4)


@given(st.lists(st.integers(0, 20), unique=True, max_size=6), SIZES)
def test_expand_rows_names_every_row_of_every_index_in_order(index: list[int], rows: int) -> None:
    found = expand_rows(torch.tensor(index, dtype=torch.int64), rows).tolist()
    assert found == [i * rows + r for i in index for r in range(rows)]


@given(st.data(), SIZES, SIZES, SIZES, SIZES)
def test_take_equals_a_plain_loop(
    data: Any, first: int, second: int, rows_first: int, rows_second: int
) -> None:
    x = torch.arange(first * rows_first * second * rows_second, dtype=torch.float32)
    x = x.view(first * rows_first, second * rows_second)
    kept = {
        axis: sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
        for axis, size in (("Q", first), ("K", second))
    }
    found = take(
        x,
        "QK",
        {axis: torch.tensor(indices) for axis, indices in kept.items()},
        {"Q": rows_first, "K": rows_second},
    )
    wanted = [
        [
            x[i * rows_first + a, j * rows_second + b].item()
            for j in kept["K"]
            for b in range(rows_second)
        ]
        for i in kept["Q"]
        for a in range(rows_first)
    ]
    assert found.tolist() == wanted


def test_take_of_everything_is_no_copy() -> None:
    x = torch.zeros(4, 6)
    assert take(x, "DF", {}, {}) is x


@given(SIZES, SIZES, SIZES, st.sampled_from([(), (1,), (3,)]))
def test_fuse_and_unfuse_are_inverse(
    groups: int, heads_per_group: int, kv_channels: int, trailing: tuple[int, ...]
) -> None:
    q = torch.randn(groups * heads_per_group * kv_channels, *trailing)
    k, v = (torch.randn(groups * kv_channels, *trailing) for _ in range(2))
    fused = fuse_qkv(q, k, v, groups, kv_channels)
    assert fused.shape == (groups * (heads_per_group + 2) * kv_channels, *trailing)
    for part, x in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(unfuse_qkv(fused, part, heads_per_group, kv_channels), x)


def test_linear_qkv_lies_as_megatron_lays_it() -> None:
    """Per query group: its q heads, then k, then v. Two groups of two heads, one channel each."""
    q, k, v = torch.tensor([0, 1, 2, 3]), torch.tensor([10, 11]), torch.tensor([20, 21])
    assert fuse_qkv(q, k, v, 2, 1).tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
