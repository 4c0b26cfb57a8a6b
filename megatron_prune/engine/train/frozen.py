"""In the optimizer's place where no weight of the model is learned.

Megatron's own optimizers take a model without parameters, but cannot be saved and loaded then. This
one has the learning rate's schedule, which masks follow, and nothing else: no gradient, no moment
and no float32 copy of any weight, so that a run takes the memory of inference beside activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_prune.engine.train.options import TrainOptions

_SAVED = {"weights": "frozen"}


class NoOptimizer:
    """What the loop asks of an optimizer, of nothing.

    Attributes:
        chained_optimizers: Megatron's optimizers, each of some weights.
        param_groups: one without parameters, for the schedule.
    """

    is_stub_optimizer = True
    chained_optimizers: tuple[Any, ...] = ()

    def __init__(self, options: TrainOptions) -> None:
        rates = {"lr": options.lr, "max_lr": options.lr, "min_lr": options.min_lr}
        self.param_groups: list[dict[str, Any]] = [{"params": [], "wd_mult": 1.0, **rates}]

    def get_loss_scale(self) -> Tensor:
        return torch.ones(1)

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss

    def zero_grad(self) -> None:
        pass

    def prepare_grads(self) -> bool:
        """Whether gradients have overflown."""
        return False

    def get_grad_norm(self) -> float:
        return 0.0

    def step_with_ready_grads(self) -> bool:
        return True

    def reload_model_params(self) -> None:
        pass

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return dict(_SAVED)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        assert saved == _SAVED, saved
