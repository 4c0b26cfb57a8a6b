"""Criteria: one file each, from statistics to scores of units. Higher means keep."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.criteria.random import random_scores
from megatron_prune.planning.scores import Criterion

__all__ = ["CRITERIA", "SCORED", "Criterion", "Needs", "random_scores"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a criterion is computed from.

    Attributes:
        axes: letters of the axes it scores; K follows from Q where it is not among them.
        weights: every weight is read once.
        forward, backward, removal: calibration text goes through the model.
    """

    axes: str
    weights: bool = False
    forward: bool = False
    backward: bool = False
    removal: str = ""


CRITERIA: dict[str, Criterion] = {"random": random_scores}
"""Those that `plan` needs no scores file for."""

SCORED: dict[str, Needs] = {
    "magnitude": Needs(axes="DQKFL", weights=True),
    "activation": Needs(axes="DQFL", forward=True),
    "wanda": Needs(axes="DQF", forward=True, weights=True),
    "flap": Needs(axes="QKF", forward=True, weights=True),
    "residual-energy": Needs(axes="D", forward=True),
    "taylor": Needs(axes="DQKFL", backward=True),
    "fisher": Needs(axes="DQKFL", backward=True),
    "perplexity": Needs(axes="L", removal="one-shot"),
    "perplexity-greedy": Needs(axes="L", removal="greedy"),
}
"""Those that `score` computes."""
