"""The cross entropy in place is torch's, value and gradient, with padding left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from megatron_prune.engine.forward import loss as engine
from megatron_prune.engine.forward.loss import real_columns, token_losses
from megatron_prune.engine.groups import Groups, model_parallel
from megatron_prune.model.grid import ParallelGrid


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    with model_parallel(ParallelGrid()) as groups:
        yield groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_bytes", [1 << 21, 1])
def test_loss_and_gradient_are_torchs(
    alone: Groups, dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_BLOCK_BYTES", block_bytes)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 3, 128, generator=generator) * 5).to(dtype)
    logits[0, 0, :97] = -1e4  # a row where padding would win
    targets = torch.randint(97, (7, 3), generator=generator)
    weights = torch.rand(7, 3, generator=generator)
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = token_losses(ours * 1, targets, vocab_size=97, group=alone.tp_group)
    (found * weights).sum().backward()
    wanted = F.cross_entropy(theirs[..., :97].float().flatten(0, 1), targets.flatten(),
                             reduction="none").view(7, 3)  # fmt: skip
    (wanted * weights).sum().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=tolerance, atol=tolerance)
    assert (ours.grad[..., 97:] == 0).all()


def test_real_columns_end_where_the_padding_begins() -> None:
    assert [real_columns(379, 128, rank) for rank in range(4)] == [128, 128, 123, 0]
