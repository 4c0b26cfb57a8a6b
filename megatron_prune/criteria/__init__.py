"""Criteria: one file each, a function that scores the units of an axis. Higher means keep."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from megatron_prune.criteria.random import random_scores

# (axis letter, its size, source layer or None for a model-wide axis, seed) -> [size] scores
Criterion = Callable[[str, int, int | None, int], Tensor]

CRITERIA: dict[str, Criterion] = {"random": random_scores}
