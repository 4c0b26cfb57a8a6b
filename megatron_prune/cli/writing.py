"""The end of every stage that writes a checkpoint: check, or write and say what was written."""

from __future__ import annotations

import argparse
import time
from contextlib import nullcontext

from megatron_prune.cli import options
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.ranks import Ranks, joined_ranks
from megatron_prune.sources.repair_record import Repair
from megatron_prune.sources.source import CARD, Source
from megatron_prune.store.megatron_args import beyond_stock, stock_flags
from megatron_prune.store.model_card import is_ours
from megatron_prune.surgery import Target, make_writer, write_checkpoint


def write(
    stage: str,
    args: argparse.Namespace,
    source: Source,
    target: Target,
    plan: PrunePlan | None = None,
    repair: Repair | None = None,
    ranks: Ranks | None = None,
) -> None:
    """Write ``source`` as ``target``; with ``--dry-run`` only say what would be written.

    Args:
        ranks: of a process group that is there already and has agreed on the arguments; else one is
            joined for the writing.
    """
    writer = make_writer(source, target)
    what = (
        f"{target.directory}: {target.format}, TP={target.grid.tensor_parallel} "
        f"PP={target.grid.pipeline_parallel}, {count_parameters(source.config):,} parameters, "
        f"{writer.total_bytes / 1e6:,.1f} MB in {len(writer.files)} files"
    )
    if args.dry_run:
        options.show(f"would write {what}")
        return
    card = source.companion_files.get(CARD)
    if card is not None and not is_ours(card.read_bytes()):
        options.say(
            f"{CARD}: the source's describes another model; a new one replaces it, with its licence"
        )
    began = time.perf_counter()
    with (
        joined_ranks() if ranks is None else nullcontext(ranks) as joined,
        options.byte_bar(stage) as progress,
    ):
        if ranks is None:
            options.agree_on_arguments(joined, args)
        write_checkpoint(
            source,
            target,
            ranks=joined,
            plan=plan,
            repair=repair,
            overwrite=args.overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    if target.format != "hf":
        _tell_about_stock(source.config)
    options.show(f"wrote {what}, {seconds:.1f} s, {writer.total_bytes / 1e6 / seconds:,.0f} MB/s")


def _tell_about_stock(config: ModelConfig) -> None:
    """Say what stock Megatron-LM would silently compute differently (docs/stock_megatron.md)."""
    if flags := stock_flags(config):
        options.say(
            "stock Megatron-LM does not read these from a checkpoint, give them beside "
            f"--use-checkpoint-args: {' '.join(flags)}"
        )
    for lost in beyond_stock(config):
        options.say(f"warning: stock Megatron-LM has no argument for {lost}")
