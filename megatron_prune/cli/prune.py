"""Cut a checkpoint as a plan says; any source format to any target format in one pass.

  megatron-prune prune --load llama --plan plan.json --save llama-pruned --to hf
  torchrun --nproc-per-node 8 -m megatron_prune prune --load llama-tp8 --plan plan.json \\
      --save llama-pruned-tp8 --to megatron --tensor-model-parallel-size 8
  megatron-prune prune --load llama --plan plan.json --save llama-pruned --to hf \\
      --repair --norm-rescale --data calibration.jsonl
  megatron-prune prune --load llama --plan plan.json --vocab-plan vocab_plan.json \\
      --save llama-pruned --to hf

Without --plan, the plan's own flags make one on the way. Reads only the slices it needs, never
builds the model; --repair and --norm-rescale run it, one layer at a time, and leave a record of
what they replaced in repair.json beside the plan. Where tokens are dropped the tokenizer's files
and all token ids follow. Optimizer state in the source is dropped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.cli.plan import (
    add_plan_arguments,
    asks_for_pruning,
    nonuniform_from,
    plan_from,
    show_plan,
)
from megatron_prune.cli.publishing import add_publishing_arguments, check_publishing, publish
from megatron_prune.cli.repairing import (
    add_repair_arguments,
    check_repair,
    repaired,
    show_repair,
)
from megatron_prune.cli.vocabulary import (
    Cut,
    add_vocabulary_arguments,
    cut_vocabulary,
    tell_padding,
)
from megatron_prune.cli.writing import write
from megatron_prune.errors import ConfigError
from megatron_prune.planning.plan import load_plan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import Source
from megatron_prune.surgery import Target, make_writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    options.add_save(parser)
    parser.add_argument("--plan", type=Path, metavar="PLAN", help="plan file; or the flags below")
    options.add_target(parser)
    add_publishing_arguments(parser)
    add_plan_arguments(parser)
    add_repair_arguments(parser)
    add_vocabulary_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.plan is not None and asks_for_pruning(args):
        raise ConfigError("--plan and the plan's own flags: give one of the two")
    if args.plan is None and args.vocab_plan is None and not asks_for_pruning(args):
        raise ConfigError("no --plan and none of its flags: nothing says what to keep")
    nonuniform_from(args)
    target = options.target_from(args)
    options.check_save(args)
    repairs = check_repair(args)
    check_publishing(args)
    _prune(args, target, repairs)
    publish(args)


def _prune(args: argparse.Namespace, target: Target, repairs: bool) -> None:
    plan = None if args.plan is None else load_plan(args.plan)
    with options.opened(args.load, args.family) as source:
        if plan is None and asks_for_pruning(args):
            plan = plan_from(args, source)
        with cut_vocabulary(args.vocab_plan, args.vocab_tokenizer, source, plan) as cut:
            write_pruned(args, target, source, cut, repairs)


def write_pruned(
    args: argparse.Namespace, target: Target, source: Source, cut: Cut, repairs: bool
) -> None:
    """Cut, repair where that is asked for, write; with ``--dry-run`` check and show."""
    if source.has_optimizer_state:
        options.say(f"{source.path}: its optimizer state is dropped")
    plan = cut.plan
    pruned = options.cast(cut.companions(PrunedSource(source, plan)), args.dtype)
    make_writer(pruned, target)  # refuses what cannot be written, before hours of work
    if not repairs or args.dry_run:
        show_plan(source, plan)
        tell_padding(plan, target)
        write("prune", args, pruned, target, plan)
        return
    with repaired(args, source, plan) as found:
        show_plan(source, plan)
        tell_padding(plan, target)
        show_repair(found.record)
        out = options.cast(cut.companions(found.source), args.dtype)
        write("prune", args, out, target, plan, repair=found.record, ranks=found.ranks)
