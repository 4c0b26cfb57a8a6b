"""Magnitude against a loop over transformers' parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prune.criteria import observed
from megatron_prune.model.axes import count_parameters
from megatron_prune.store import open_source
from tests.criteria.loops import KINDS, Scored, assert_scores, unit_sums


@pytest.mark.parametrize("kind", KINDS)
def test_a_unit_is_the_l2_norm_of_all_the_weights_it_owns(
    kind: str, scored: Callable[[str], Scored]
) -> None:
    one = scored(kind)
    squares = {name: x.detach().square() for name, x in one.model.named_parameters()}
    wanted = {axis: x.sqrt() for axis, x in unit_sums(one, squares).items()}
    assert_scores(one, "magnitude", wanted)


@pytest.mark.parametrize("kind", ["gqa", "all_bias"])
def test_weights_read_in_blocks_give_the_same_sums(
    kind: str, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of a pico model is as large as a block, those of a real one are."""
    source = open_source(models(kind))
    whole = observed.weight_squares(source)
    monkeypatch.setattr(observed, "_ROWS", 1000)
    reads: list[int] = []
    blocks = observed.weight_squares(source, reads.append)
    assert max(reads) <= 1000 and sum(reads) == count_parameters(source.config)
    for axis, x in whole.units.items():
        torch.testing.assert_close(blocks.units[axis], x, msg=axis)
    for name in ("readers", "proj", "fc2"):
        torch.testing.assert_close(getattr(blocks, name), getattr(whole, name), msg=name)
