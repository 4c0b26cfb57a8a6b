"""Batch sizes ramp up as Megatron's do."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core import num_microbatches_calculator as megatron

from megatron_prune.engine.train.options import TrainOptions


def _options(full: int, ramp: tuple[int, int, int] | None) -> TrainOptions:
    return TrainOptions(
        load=None, save=Path("run"), data_path=(), train_iters=1, micro_batch_size=1, seq_length=2,
        lr=0.0, global_batch_size=full, rampup_batch_size=ramp,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("full", "ramp"), [(16, (4, 2, 100)), (32, (2, 6, 37)), (12, (4, 8, 50)), (8, (2, 2, 7))]
)
def test_the_ramp_is_megatrons(full: int, ramp: tuple[int, int, int]) -> None:
    megatron.unset_num_microbatches_calculator()
    megatron.init_num_microbatches_calculator(-1, list(ramp), full, 1, 2)
    options, sizes = _options(full, ramp), []
    try:
        for consumed in range(0, 2 * ramp[2], 2):
            megatron.update_num_microbatches(consumed, consistency_check=False)
            sizes.append(options.batch_size_after(consumed, 2))
            assert sizes[-1] == megatron.get_current_global_batch_size(), consumed
    finally:
        megatron.unset_num_microbatches_calculator()
    assert sizes[0] == ramp[0] and sizes[-1] == full


def test_samples_add_up() -> None:
    assert _options(4, None).samples_after(5, 1) == 20
    assert _options(4, (1, 1, 9)).samples_after(6, 1) == 1 + 1 + 1 + 2 + 2 + 3
