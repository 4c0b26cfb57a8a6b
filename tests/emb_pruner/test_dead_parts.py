"""A token that never comes up may still be what another is merged from."""

from __future__ import annotations

import numpy as np
import pytest

from emb_pruner.forest import Forest
from emb_pruner.selection import METHODS, select

# a, b, c, then ab, which no text encodes to, and abc = ab + c
FOREST = Forest(
    parts=(None, None, None, (0, 1), (3, 2)),
    rank=(0, 1, 2, 3, 4),
    mandatory={0: "byte", 1: "byte", 2: "byte"},
    dead=frozenset([3]),
)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_size_can_be_had_where_a_part_never_comes_up(method: str) -> None:
    counts = np.array([9, 9, 9, 0, 9])
    kept = {size: select(FOREST, size, method=method, counts_V=counts) for size in (3, 4, 5)}
    assert kept == {3: (0, 1, 2), 4: (0, 1, 2, 3), 5: (0, 1, 2, 3, 4)}
