"""Cut a checkpoint as a plan says; any source format to any target format in one pass.

  megatron-prune prune --load llama --plan plan.json --save llama-pruned --to hf
  torchrun --nproc-per-node 8 -m megatron_prune prune --load llama-tp8 --plan plan.json \\
      --save llama-pruned-tp8 --to megatron --tensor-model-parallel-size 8
  megatron-prune prune --load llama --plan plan.json --save llama-pruned --to hf \\
      --repair --norm-rescale --data calibration.jsonl
  megatron-prune prune --load llama --plan plan.json --vocab-plan vocab_plan.json \\
      --save llama-pruned --to hf

Without --plan, the plan's own flags make one on the way. The command reads only the slices it
needs and never builds the model; --repair and --norm-rescale run it, one layer at a time, and leave
a record of what they replaced in repair.json beside the plan. Where tokens are dropped the
tokenizer's files and all token ids follow. Optimizer state in the source is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.sources.finite import FiniteSource
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import Source
from megatron_prune.stages.common import check_save, opened
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.deciding import decide, plan_table, warn_not_loadable
from megatron_prune.stages.reading import check_weights, check_what_goes
from megatron_prune.stages.repairing import RepairFlags, repair_lines, repaired
from megatron_prune.stages.sparse_input import tell_zeros_left
from megatron_prune.stages.targeting import Targeted
from megatron_prune.stages.vocabulary import Cut, VocabularyFlags, cut_vocabulary, tell_padding
from megatron_prune.stages.writing import Written, tell_dropped, write
from megatron_prune.surgery import Target, make_writer


@dataclass(frozen=True, kw_only=True)
class PruneOptions(VocabularyFlags, RepairFlags, Targeted):
    plan: Path | None = flag("plan file; or the flags below", default=None, metavar="PLAN")


def prune(options: PruneOptions, console: Console = SILENT) -> Written:
    """Write the model that the plan leaves, repaired where that is asked for; see `write`.

    Raises:
        ConfigError: options that do not go together, or an output that holds the input.
        PlanError, ShapeError, CheckpointError: this model cannot be pruned so.
    """
    decides = options.asks_for_pruning
    if options.plan is not None and decides:
        raise ConfigError("--plan and the plan's own flags: give one of the two")
    if options.plan is None and options.vocab_plan is None and not decides:
        raise ConfigError("no --plan and none of its flags: nothing says what to keep")
    options.check_nonuniform()
    target = options.target
    check_save(options.save, options.load, overwrite=options.overwrite)
    repair = options if options.asks_for_repair() else None
    options.check_publishing(options.to)
    plan = None if options.plan is None else load_plan(options.plan)
    with opened(options.load, options.family) as source:
        if decides:
            plan = decide(options, source, console)
        with cut_vocabulary(options.vocab_plan, options.vocab_tokenizer, source, plan) as cut:
            if decides and options.scores is None:  # else `plan` or `score` has looked at it all
                source = _looked_at(options, source, cut.plan, console)
            written = write_pruned(options, target, source, cut, console, repair)
    return options.publish(written, console)


def _looked_at(options: PruneOptions, source: Source, plan: PrunePlan, console: Console) -> Source:
    """The source, whose weights are looked at as they are read; those that are not, now."""
    if options.dry_run:
        check_weights(source, console, allow=options.allow_nonfinite)
        return source
    checked = options.checked(source)
    check_what_goes(checked, plan, console)
    return checked


def write_pruned(
    options: Targeted,
    target: Target,
    source: Source,
    cut: Cut,
    console: Console,
    repair: RepairFlags | None = None,
) -> Written:
    """Cut, repair where that is asked for, write; with ``dry_run`` check and show."""
    tell_dropped(source, console)
    plan = cut.plan
    below = source if isinstance(source, FiniteSource) else None
    is_refitted = repair is not None and repair.repair
    tell_zeros_left(source, plan, console, is_refitted=is_refitted)
    pruned = options.cast(cut.companions(PrunedSource(source, plan)))
    make_writer(pruned, target)  # refuses what cannot be written, before hours of work
    if repair is None or options.dry_run:
        _show(source, cut, target, console)
        return write("prune", options, pruned, target, console, plan, below=below)
    with repaired(repair, options.save, source, plan, console) as found:
        _show(source, cut, target, console)
        for line in repair_lines(found.record):
            console.show(line)
        out = options.cast(cut.companions(found.source))
        return write(
            "prune",
            options,
            out,
            target,
            console,
            plan,
            repair=found.record,
            ranks=found.ranks,
            below=below,
        )


def _show(source: Source, cut: Cut, target: Target, console: Console) -> None:
    console.show(plan_table(source.config, cut.plan))
    warn_not_loadable(source.config, cut.plan, console)
    tell_padding(cut.plan, target, console)
