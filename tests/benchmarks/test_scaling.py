"""The formula of the memory that training takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import MODELS, sparsify_memory, training_memory
from megatron_prune.families import read_config
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.grid import ParallelGrid

Models = Callable[[str], Path]


def test_training_memory_of_all_ranks_holds_every_parameter_once_and_its_padding(
    models: Callable[[str], Path],
) -> None:
    """18 bytes a parameter with Adam in mixed precision; sharded optimizer state over DP."""
    config = read_config(models("gqa") / "config.json")
    padded = replace(config, shape=replace(config.shape, vocab_size=384))
    whole = training_memory(config, ParallelGrid())
    assert whole.total == 18 * count_parameters(padded)
    sharded = training_memory(config, ParallelGrid(tensor_parallel=3))
    assert sharded.total * 3 == pytest.approx(whole.total, abs=100)
    assert training_memory(config, ParallelGrid(), data_parallel=4).optimizer == (
        whole.optimizer // 4
    )


def test_the_heaviest_stage_of_uneven_ones_counts(models: Models) -> None:
    config = read_config(models("gqa") / "config.json")
    even = training_memory(config, ParallelGrid(pipeline_parallel=2))
    uneven = training_memory(config, ParallelGrid(pipeline_parallel=2, first_stage_layers=1))
    assert uneven.parameters > even.parameters


def test_sparsify_holds_second_moments_as_its_docstring_says() -> None:
    """Llama-3-70B: three inputs of 8192 and one of 28672."""
    config = MODELS["Llama-3-70B"][0]
    squares = 3 * 8192**2 + 28672**2
    one = sparsify_memory(config, "sparsegpt", tensor_parallel=8, ranks=64)
    assert one.statistics == 8 * squares // 8 + 4 * 28672**2 // 8
    assert one.preparing == 28 * 28672**2  # of fc2, when no other input waits
    rows = 8192 // 64 * 28672 * 4
    assert one.pruning == 12 * 28672**2 + 9 * rows
    alone = sparsify_memory(config, "sparsegpt")
    assert alone.statistics > one.statistics
    assert alone.pruning > one.pruning
    assert alone.preparing == one.preparing


def test_wanda_holds_rows_alone() -> None:
    found = sparsify_memory(MODELS["Llama-2-7B"][0], "wanda")
    assert found.statistics == found.preparing == 0
    assert found.pruning == (2 * 2 + 6) * 4096 * 11008 * 4  # gate and up, and what one takes
