"""`take` against plain loops."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.model.tensors import expand_rows, take

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
