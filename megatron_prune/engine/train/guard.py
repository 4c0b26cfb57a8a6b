"""Which steps are not taken: loss or gradient not a number, or a loss far above those before.

Such a step is skipped as Megatron skips one: its samples count as consumed, the iteration is
counted, weights, optimizer and learning rate stay. More than ``--skip-nonfinite`` of them in a row
end the run. All numbers judged here are sums over all ranks, so all ranks decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_prune.engine.objectives.objective import LM_LOSS
from megatron_prune.engine.train.options import TrainOptions


class StepGuard:
    """Counts the steps that were skipped and remembers the losses of those that were not."""

    def __init__(self, options: TrainOptions, state: Mapping[str, Any] | None) -> None:
        """``state`` is what `state` gave before; None, or one of an older run: begin anew."""
        state = state or {}
        self.options = options
        self.in_a_row = int(state.get("in_a_row", 0))
        self._since_told = int(state.get("since_told", 0))
        self._losses = [float(x) for x in state.get("losses", [])][-options.loss_spike_window :]

    def state(self) -> dict[str, Any]:
        return {
            "in_a_row": self.in_a_row,
            "since_told": self._since_told,
            "losses": list(self._losses),
        }

    def wrong_loss(self, loss: float, others: Iterable[tuple[str, float]] = ()) -> str | None:
        """Why a step with this loss, and ``others`` by name, is not taken; None: it is."""
        if wrong := self._spike(loss):
            return wrong
        for name, value in ((LM_LOSS, loss), *others):
            if not math.isfinite(value):
                return f"{name} is {value}"
        return None

    def _spike(self, loss: float) -> str | None:
        factor, window = self.options.loss_spike_factor, self.options.loss_spike_window
        if factor is None or len(self._losses) < window or not math.isfinite(loss):
            return None
        usual = statistics.median(self._losses)
        if loss <= factor * usual:
            return None
        return f"lm loss {loss:.4g} is above {factor:g} x {usual:.4g}, the median of {window} steps"

    def count(self, wrong: str | None, loss: float) -> bool:
        """Note a step; whether there were too many to skip, and the run has to stop."""
        if wrong is None:
            self.in_a_row = 0
            if self.options.loss_spike_factor is not None:
                self._losses = [*self._losses, loss][-self.options.loss_spike_window :]
            return False
        self.in_a_row += 1
        self._since_told += 1
        return self.in_a_row > self.options.skip_nonfinite

    def take_skipped(self) -> int:
        """Steps skipped since this was asked last."""
        skipped, self._since_told = self._since_told, 0
        return skipped
