"""A criterion is one file: what it registers is all that planning and scoring know of it."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest

from megatron_prune import criteria
from megatron_prune.criteria import CRITERIA, SCORED
from megatron_prune.criteria.registry import criterion

FILES = {
    path.stem
    for path in Path(criteria.__path__[0]).glob("*.py")
    if path.stem not in ("__init__", "registry", "observed")
}


def test_every_file_registers_a_criterion_of_its_own() -> None:
    registered = [*CRITERIA.values(), *(one.scores for one in SCORED.values())]
    assert {function.__module__.rpartition(".")[2] for function in registered} == FILES


@pytest.mark.parametrize("name", SCORED)
def test_a_criterion_takes_the_evidence_that_it_says_it_needs(name: str) -> None:
    assert tuple(signature(SCORED[name].scores).parameters) == SCORED[name].needs


def test_those_that_cost_least_come_first() -> None:
    assert next(iter(SCORED)) == "magnitude" and [*SCORED][-1] == "perplexity-greedy"


def test_a_name_or_evidence_that_is_wrong_is_noticed_at_once() -> None:
    with pytest.raises(AssertionError, match="wanda stands twice"):
        criterion("wanda", axes="F", needs=("observed",))
    with pytest.raises(AssertionError, match="needs .*'luck'"):
        criterion("mine", axes="F", needs=("luck",))
