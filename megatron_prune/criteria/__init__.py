"""Criteria: one file each, from statistics to scores of units. Higher means keep."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.criteria.random import random_scores
from megatron_prune.scores import Criterion

__all__ = ["CRITERIA", "SCORED", "Criterion", "Needs", "random_scores"]


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a criterion is computed from.

    Attributes:
        weights: every weight is read once.
        forward, backward, removal: calibration text goes through the model.
    """

    weights: bool = False
    forward: bool = False
    backward: bool = False
    removal: str = ""


CRITERIA: dict[str, Criterion] = {"random": random_scores}
"""Those that `plan` needs no scores file for."""

SCORED: dict[str, Needs] = {
    "magnitude": Needs(weights=True),
    "activation": Needs(forward=True),
    "wanda": Needs(forward=True, weights=True),
    "flap": Needs(forward=True, weights=True),
    "residual-energy": Needs(forward=True),
    "taylor": Needs(backward=True),
    "fisher": Needs(backward=True),
    "perplexity": Needs(removal="one-shot"),
    "perplexity-greedy": Needs(removal="greedy"),
}
"""Those that `score` computes."""
