"""What is put on record of a pruned matrix, at sizes whose squares float32 has not."""

from __future__ import annotations

import pytest
import torch

from megatron_prune.sparsity.facts import facts_of, rounded_share
from megatron_prune.sparsity.method import Inputs


@pytest.mark.parametrize("scale", [1.0, 2.0**-90, 2.0**70, 2.0**110])
def test_energy_and_error_do_not_depend_on_the_size_of_the_weights(scale: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 12, generator=generator)
    inputs = Inputs(windows=1, squares_I=x.double().square().sum(0), gram_II=x.T @ x)
    before = torch.randn(5, 12, generator=generator)
    after = before * (before.abs() > 0.4)
    zeros, count, kept, whole, lost, size, bad = facts_of(
        before * scale, after * scale, inputs
    ).tolist()
    assert (zeros, count, bad) == (int((after == 0).sum()), 60, 0)
    squares = x.double().square().sum(0)
    energy = [(w.double().square() * squares).sum() for w in (after, before)]
    assert kept / whole == pytest.approx(float(energy[0] / energy[1]), rel=1e-6)
    outputs = [(w.double() @ x.double().T).square().sum() for w in (before - after, before)]
    assert lost / size == pytest.approx(float(outputs[0] / outputs[1]), rel=1e-4)


def test_a_share_of_nothing_or_of_what_is_no_number_is_none() -> None:
    assert rounded_share(1.0, 3.0) == 0.333333
    for part, whole in ((0.0, 0.0), (float("inf"), float("inf")), (1.0, float("nan"))):
        assert rounded_share(part, whole) is None
