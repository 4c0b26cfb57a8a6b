"""Check a pruned or sparse checkpoint against what it was made from, value by value.

  megatron-prune verify --load llama-pruned --source llama --plan plan.json
  megatron-prune verify --load llama-2of4 --source llama

Without --plan the checkpoint is a sparse one: its sparsity.json says which matrices have zeros, and
everything else is the source's. The command exits with 3 at the first difference and names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_prune import verify as checking
from megatron_prune import verify_sparse as checking_sparse
from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag
from megatron_prune.model.axes import count_parameters
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.sources.pruned import check_plan_fits
from megatron_prune.sources.source import SPARSITY, Source
from megatron_prune.sources.sparsity_record import Sparsity, load_sparsity
from megatron_prune.stages.common import Loads, opened
from megatron_prune.stages.console import SILENT, Console


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Loads):
    source: Path = flag("what was pruned, or made sparse", metavar="SRC")
    plan: Path | None = flag(
        "plan file; none for a sparse checkpoint", default=None, metavar="PLAN"
    )


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A checkpoint that holds what its plan says."""

    path: Path
    verdict: checking.Verdict

    def __str__(self) -> str:
        found = self.verdict
        repaired = f" ({found.repaired} repaired as recorded)" if found.repaired else ""
        gates = f" with the recorded gates of {', '.join(found.folded)}" if found.folded else ""
        return (
            f"{self.path}: {found.tensors} tensors{repaired}, {found.values:,} values as planned"
            f"{gates}; "
            f"{_files(found.files)}"
        )


@dataclass(frozen=True, kw_only=True)
class VerifiedSparse:
    """A checkpoint that holds the zeros of its record, and else what its source holds."""

    path: Path
    record: Sparsity
    verdict: checking_sparse.SparseVerdict

    def __str__(self) -> str:
        found = self.verdict
        with_pattern = sum(x.pattern is not None for x in self.record.tensors.values())
        patterns = sorted({x.pattern for x in self.record.tensors.values() if x.pattern})
        held = f", {' and '.join(patterns)} in every group of {with_pattern}" if patterns else ""
        exact = found.matrices - found.hashed
        kept = [f"kept weights of {exact} are the source's"] if exact else []
        kept += [f"{found.hashed} have the recorded SHA-256"] if found.hashed else []
        share = found.zeros / max(1, found.size)
        return (
            f"{self.path}: {found.tensors} tensors, {found.values:,} values; "
            f"{self.record.words}: {found.matrices} matrices with {share:.4%} of zeros as "
            f"recorded{held}, {', '.join(kept) or 'none'}; all else is the source's; "
            f"{_files(found.files)}"
        )


def _files(files: int | None) -> str:
    return "no manifest" if files is None else f"{files} files as in the manifest"


def verify(options: VerifyOptions, console: Console = SILENT) -> Verified | VerifiedSparse:
    """Compare every value; see `megatron_prune.verify` and `megatron_prune.verify_sparse`.

    Raises:
        DamagedError: at the first difference.
        PlanError: the plan is not of this source.
        ConfigError: a plan and a sparse checkpoint, or neither; a sparse one of another source, or
            trained since.
    """
    plan = None if options.plan is None else load_plan(options.plan)
    with (
        opened(options.load, options.family) as found,
        opened(options.source, options.family) as source,
    ):
        if plan is None:
            return _verify_sparse(options, found, source, console)
        return _verify_pruned(options, found, source, plan, console)


def _verify_pruned(
    options: VerifyOptions, pruned: Source, source: Source, plan: PrunePlan, console: Console
) -> Verified:
    if pruned.sparsity_path is not None:
        raise ConfigError(
            f"--load {options.load}: was made sparse after it was pruned ({SPARSITY}), so a plan "
            "does not tell its weights; verify the pruned model with --plan, then this one with "
            "--source PRUNED and without --plan"
        )
    check_plan_fits(source, plan)
    total = count_parameters(replace(source.config, shape=plan.target))
    with console.bar("verify", unit="it") as bar:
        verdict = checking.verify(pruned, source, plan, bar(total))
    return Verified(path=options.load, verdict=verdict)


def _verify_sparse(
    options: VerifyOptions, sparse: Source, source: Source, console: Console
) -> VerifiedSparse:
    if sparse.sparsity_path is None:
        raise ConfigError(
            f"--load {options.load}: has no {SPARSITY}, so it is not known to be sparse; give the "
            "plan it was pruned with as --plan"
        )
    record = load_sparsity(sparse.sparsity_path)
    with console.bar("verify", unit="it") as bar:
        verdict = checking_sparse.verify_sparse(
            sparse, source, record, bar(count_parameters(source.config))
        )
    return VerifiedSparse(path=options.load, record=record, verdict=verdict)
