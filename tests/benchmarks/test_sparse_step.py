"""The plain loops that the prune step is measured against do what our methods do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.plain_sparsity import PROCEDURES
from megatron_prune.solve.kselect import ALONE
from megatron_prune.sparsity.method import Asked, How, Inputs, Pattern, method_for

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # of a benchmark; nothing that ships
TWO_OF_FOUR = Asked(share=0.5, pattern=Pattern(keep=2, group=4))


def how_of(row: str) -> tuple[str, How]:
    name, _, option = row.partition(", ")
    return name, {
        "": How(),
        "variant": How(variant=True),
        "refit": How(refit=True),
    }.get(option) or How(weight_update=option)


@pytest.mark.parametrize("asked", [Asked(share=0.5), TWO_OF_FOUR], ids=["50%", "2:4"])
@pytest.mark.parametrize("name", PROCEDURES)
def test_a_plain_procedure_prunes_as_the_package_does(name: str, asked: Asked) -> None:
    method_name, how = how_of(name)
    if how.variant and asked.pattern:
        return
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(512, 160, generator=generator)
    x_TI = x_TI @ (torch.eye(160) + 0.1 * torch.randn(160, 160, generator=generator))
    inputs = Inputs(
        windows=4,
        squares_I=x_TI.square().sum(0, dtype=torch.float64) / 4,
        gram_II=x_TI.T @ x_TI,
    )
    weight = torch.randn(48, 160, generator=generator)
    method = method_for(method_name, how)
    prepared = {} if method.needs == "weights" else method.prepare(inputs, how)
    (found,) = method.prune([weight], prepared, asked, how, ALONE)
    plain = PROCEDURES[name](weight, inputs, asked)

    def error(pruned: torch.Tensor) -> float:
        return float((x_TI @ (pruned - weight).T).norm())

    # ALPS stops a step sooner or later by rounding, with other zeros and as good a layer
    alike = 0.95 if name == "alps" else 0.998
    assert ((plain == 0) == (found.weight_RI == 0)).float().mean() > alike
    assert error(found.weight_RI) == pytest.approx(error(plain), rel=0.01)


def test_both_tables_are_printed(models: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "benchmarks" / "sparse_step.py", "--model", models("gqa")),
            *("--repeats", "1", "--only", "50% wanda", "2:4 sparsegpt"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    against_plain = [row for row in rows if row[-1].endswith("% |")]
    assert [row[1] for row in against_plain] == ["wanda", "sparsegpt"]
    assert all(float(row[-1].split("%")[0]) > 99.9 for row in against_plain)
    assert len(rows) == 2 * (1 + 2), done.stdout
