"""Criteria: one file each, from statistics to scores of units. Higher means keep.

Every module here is imported, so that what it registers is known; a new criterion is a new file.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from megatron_prune.criteria.registry import CRITERIA, SCORED, Scoring, sort_by_cost

__all__ = ["CRITERIA", "SCORED", "Scoring"]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
sort_by_cost()
