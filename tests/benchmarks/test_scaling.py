"""The formula of the memory that training takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.scaling import training_memory
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
