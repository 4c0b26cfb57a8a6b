"""Which rank holds what: sums, neighbours and refusals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_prune.errors import ShapeError
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size, part_range
from megatron_prune.model.shape import ModelShape

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=379,
)


@given(st.integers(0, 500), st.integers(1, 16))
def test_parts_cover_an_axis_once_and_in_order(size: int, parts: int) -> None:
    ranges = [part_range(size, part, parts) for part in range(parts)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(size))
    if size % parts == 0:
        assert {stop - start for start, stop in ranges} == {size // parts}


stage = st.none() | st.integers(1, 6)


@given(st.integers(1, 40), st.integers(1, 8), stage, stage)
def test_stages_hold_every_layer_once_or_are_refused(
    layers: int, stages: int, first: int | None, last: int | None
) -> None:
    grid = ParallelGrid(pipeline_parallel=stages, first_stage_layers=first, last_stage_layers=last)
    fixed = sum(n or 0 for n in (first, last))
    middle = stages - sum(n is not None for n in (first, last))
    legal = middle >= 0 and (
        fixed == layers
        if middle == 0
        else layers - fixed >= middle and (layers - fixed) % middle == 0
    )
    if not legal:
        with pytest.raises(ShapeError):
            grid.layers_per_stage(layers)
        return
    sizes = grid.layers_per_stage(layers)
    assert len(sizes) == stages and sum(sizes) == layers and min(sizes) >= 1
    assert first is None or sizes[0] == first
    assert last is None or sizes[-1] == last
    held = [n for rank in range(stages) for n in grid.stage_layers(layers, rank)]
    assert held == list(range(layers))


@given(st.integers(1, 200_000), st.integers(1, 64))
def test_vocabulary_is_padded_to_the_next_multiple_of_128_per_rank(vocab: int, tp: int) -> None:
    padded = padded_vocab_size(vocab, tp)
    assert padded % (128 * tp) == 0
    assert 0 <= padded - vocab < 128 * tp


def test_ranks_come_in_megatrons_order() -> None:
    """Tensor-parallel ranks lie next to each other, stages are the outer loop."""
    grid = ParallelGrid(tensor_parallel=2, pipeline_parallel=2)
    assert list(grid.ranks()) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert grid.world_size == 4


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (ParallelGrid(tensor_parallel=4), "size 4 does not divide .* 6; legal .*: 1, 3"),
        (ParallelGrid(tensor_parallel=0), "size is 0"),
        (ParallelGrid(pipeline_parallel=0), "size is 0"),
        (ParallelGrid(pipeline_parallel=3), "4 layers do not divide .* 3; legal sizes: 1, 2, 4"),
        (ParallelGrid(pipeline_parallel=5), "4 layers over 5 pipeline stages"),
        (
            ParallelGrid(pipeline_parallel=2, first_stage_layers=3, last_stage_layers=2),
            "4 layers over 2 pipeline stages with first 3 and last 2 does not add up",
        ),
        (ParallelGrid(pipeline_parallel=1, first_stage_layers=3), "does not add up"),
    ],
)
def test_an_impossible_layout_is_refused_with_the_legal_sizes(
    grid: ParallelGrid, message: str
) -> None:
    with pytest.raises(ShapeError, match=message):
        grid.check(SHAPE)


@given(st.integers(1, 90), st.integers(1, 9))
def test_a_grid_for_any_number_of_layers_is_nearly_even(layers: int, stages: int) -> None:
    grid = ParallelGrid(pipeline_parallel=stages, first_stage_layers=1).for_layers(layers)
    if layers < stages:
        with pytest.raises(ShapeError, match=f"{layers} layers"):
            grid.layers_per_stage(layers)
        return
    found = grid.layers_per_stage(layers)
    assert sum(found) == layers and len(found) == stages and min(found) >= 1
    assert len(set(found[1:-1])) <= 1
    if layers % stages == 0:
        assert grid == ParallelGrid(pipeline_parallel=stages)
    assert max(found) <= -(-layers // stages) + (stages + 1) // 2
