"""An objective of which single steps go wrong, for runs that have to skip them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.engine.forward.microbatches import Microbatch, Step
from megatron_prune.engine.objectives.objective import LM_LOSS, LanguageModelLoss


class WrongSteps(LanguageModelLoss):
    """The language-model loss, of which some steps are wrong.

    ``at``: iteration -> ``loss``, told as nan; ``high``, told as 100 more; or ``gradient``, which
    becomes infinite in places, in whatever part of the model this rank holds.
    """

    def __init__(self, at: Mapping[int, str]) -> None:
        self._at = at
        self._wrong: str | None = None

    def attach(self, model: Any) -> None:
        for parameter in model.parameters():
            parameter.register_hook(self._gradient)

    def _gradient(self, gradient: Tensor) -> Tensor:
        if self._wrong != "gradient":
            return gradient
        wrong = gradient.clone()
        wrong.view(-1)[0::7] = torch.inf
        return wrong

    def beside(self, batches: Iterator[Microbatch], step: Step) -> Iterator[Microbatch]:
        self._wrong = self._at.get(step.iteration)
        return batches

    def loss(self, losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        mean, told = super().loss(losses_bs, batch)
        more = {"loss": math.nan, "high": 100.0}.get(self._wrong or "", 0.0)
        return mean, {LM_LOSS: told[LM_LOSS] + more}


@contextmanager
def wrong_steps(at: Mapping[int, str], rank: int = 0) -> Iterator[None]:
    """`train` on the command line with `WrongSteps`, on one rank; on others nothing is wrong."""
    from megatron_prune.engine.train import loop

    mine = at if int(os.environ.get("RANK", "0")) == rank else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", partial(loop.train, wrap=lambda *_: WrongSteps(mine)))
        yield
