"""The table that criteria write themselves into, each from its own file.

    @criterion("wanda", axes="DQF", needs=("observed", "weights"))
    def wanda_scores(observed: Observed, weights: WeightSquares) -> dict[str, Tensor]: ...

A criterion says which evidence it needs; scoring gathers what is needed, once for all criteria, and
hands it over by these names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_prune.model.lazy import Tensor
from megatron_prune.planning.scores import Criterion

EVIDENCE = ("weights", "observed", "gradients", "losses_without", "removed", "last_losses")
"""What there is, in the order in which it is gathered: `WeightSquares` of one reading of every
weight; `Observed` of one forward pass; `Gradients` of one backward pass a sample; [L] the loss
without each layer; the layers that went greedily, in order, and [L] the losses of the last round.
Tensors are float64."""
_REMOVES_LAYERS = {"losses_without", "removed", "last_losses"}
_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """How scores are computed from evidence.

    Attributes:
        axes: letters of the axes it scores; K follows from Q where it is not among them.
        needs: of `EVIDENCE`.
        scores: takes ``needs`` by name; gives axis letter -> scores, higher means keep.
    """

    axes: str
    needs: tuple[str, ...]
    scores: Callable[..., dict[str, Tensor]]

    @property
    def removal(self) -> bool:
        """Whether layers are taken out of the running model for it."""
        return not _REMOVES_LAYERS.isdisjoint(self.needs)

    @property
    def is_observed(self) -> bool:
        """Whether calibration text goes through the model for it."""
        return {*self.needs} != {"weights"}


CRITERIA: dict[str, Criterion] = {}
"""Those that `plan` needs no scores file for: they need no evidence."""

SCORED: dict[str, Scoring] = {}
"""Those that `score` computes; sorted by what they cost once all are registered."""


def criterion(
    name: str, *, axes: str, needs: Sequence[str] = ()
) -> Callable[[_Function], _Function]:
    """Register the decorated function; without ``needs`` it is a `Criterion`."""
    assert name not in CRITERIA and name not in SCORED, f"criterion {name} stands twice"
    assert {*needs} <= {*EVIDENCE}, f"criterion {name} needs {needs}; there is {EVIDENCE}"

    def register(function: _Function) -> _Function:
        if needs:
            SCORED[name] = Scoring(axes=axes, needs=tuple(needs), scores=function)
        else:
            CRITERIA[name] = function
        return function

    return register


def sort_by_cost() -> None:
    """Bring what is registered into the order of what it needs."""
    order = sorted(SCORED.items(), key=lambda item: max(map(EVIDENCE.index, item[1].needs)))
    SCORED.clear()
    SCORED.update(order)
