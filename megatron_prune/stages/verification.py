"""Check a pruned checkpoint against its source and its plan, value by value.

  megatron-prune verify --load llama-pruned --source llama --plan plan.json

The command exits with 3 at the first difference and names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prune import verify as checking
from megatron_prune.flags import flag
from megatron_prune.model.axes import count_parameters
from megatron_prune.planning.plan import load_plan
from megatron_prune.sources.pruned import check_plan_fits
from megatron_prune.stages.common import Loads, opened
from megatron_prune.stages.console import SILENT, Console


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Loads):
    source: Path = flag("what was pruned", metavar="SRC")
    plan: Path = flag("plan file", metavar="PLAN")


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A checkpoint that holds what its plan says."""

    path: Path
    verdict: checking.Verdict

    def __str__(self) -> str:
        found = self.verdict
        files = "no manifest" if found.files is None else f"{found.files} files as in the manifest"
        repaired = f" ({found.repaired} repaired as recorded)" if found.repaired else ""
        return (
            f"{self.path}: {found.tensors} tensors{repaired}, {found.values:,} values as planned; "
            f"{files}"
        )


def verify(options: VerifyOptions, console: Console = SILENT) -> Verified:
    """Compare every value; see `megatron_prune.verify`.

    Raises:
        DamagedError: at the first difference.
        PlanError: the plan is not of this source.
    """
    plan = load_plan(options.plan)
    with (
        opened(options.load, options.family) as pruned,
        opened(options.source, options.family) as source,
        console.bar("verify", unit="it") as bar,
    ):
        check_plan_fits(source, plan)
        total = count_parameters(replace(source.config, shape=plan.target))
        verdict = checking.verify(pruned, source, plan, bar(total))
    return Verified(path=options.load, verdict=verdict)
