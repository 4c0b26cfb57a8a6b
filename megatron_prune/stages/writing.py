"""The end of every stage that writes a checkpoint: check, or write and say what was written."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megatron_prune.model.axes import count_parameters
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.ranks import Ranks, joined_ranks
from megatron_prune.sources.finite import FiniteSource
from megatron_prune.sources.folding_record import Folding
from megatron_prune.sources.repair_record import Repair
from megatron_prune.sources.source import CARD, Source
from megatron_prune.stages.common import Saves, agree_on_start
from megatron_prune.stages.console import Console
from megatron_prune.stages.reading import tell_nonfinite
from megatron_prune.store.megatron_args import beyond_stock, stock_flags
from megatron_prune.store.model_card import is_ours
from megatron_prune.surgery import Target, make_writer, write_checkpoint


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that was written; with ``--dry-run`` one that would be, in None seconds.

    Attributes:
        pushed: the address of its upload.
    """

    target: Target
    parameters: int
    bytes: int
    files: int
    seconds: float | None
    pushed: str | None = None

    @property
    def path(self) -> Path:
        return self.target.directory

    @property
    def _run(self) -> str:
        run = self.target.run
        return "" if run is None else f"the optimizer's state of iteration {run.iteration}, "

    def __str__(self) -> str:
        grid = self.target.grid
        what = (
            f"{self.path}: {self.target.format}, TP={grid.tensor_parallel} "
            f"PP={grid.pipeline_parallel}, {self.parameters:,} parameters, {self._run}"
            f"{self.bytes / 1e6:,.1f} MB in {self.files} files"
        )
        if self.seconds is None:
            return f"would write {what}"
        rate = self.bytes / 1e6 / self.seconds
        pushed = "" if self.pushed is None else f"\npushed {self.path}: {self.pushed}"
        return f"wrote {what}, {self.seconds:.1f} s, {rate:,.0f} MB/s{pushed}"


def write(
    stage: str,
    options: Saves,
    source: Source,
    target: Target,
    console: Console,
    plan: PrunePlan | None = None,
    repair: Repair | None = None,
    ranks: Ranks | None = None,
    below: FiniteSource | None = None,
    folding: Folding | None = None,
) -> Written:
    """Write ``source`` as ``target``; with ``dry_run`` only find out what would be written.

    Args:
        plan, repair, folding: what ``source`` was pruned with just now, and the records of what
            else was done to it; without a plan, those that it carries travel along.
        below: what ``source`` is made of, where its weights too are looked at as they are read.
        ranks: of a process group that is there already and has agreed on the options; else one is
            joined for the writing.
    """
    writer = make_writer(source, target)
    checked, seconds = options.checked(source), None
    if not options.dry_run:
        card = source.companion_files.get(CARD)
        if card is not None and not is_ours(card.read_bytes()):
            console.say(
                f"{CARD}: the source's describes another model; a new one replaces it, with its "
                "licence"
            )
        began = time.perf_counter()
        with (
            joined_ranks() if ranks is None else nullcontext(ranks) as joined,
            console.bar(stage, unit="B") as progress,
        ):
            if ranks is None:
                agree_on_start(joined, options, None)
            write_checkpoint(
                checked,
                target,
                ranks=joined,
                plan=plan,
                repair=repair,
                folding=folding,
                overwrite=options.overwrite,
                progress=progress,
            )
            texts = checked.texts + ([] if below is None else below.texts)
            tell_nonfinite(chain.from_iterable(joined.gather(texts)), console)
        seconds = time.perf_counter() - began
        if target.format != "hf":
            _tell_about_stock(source.config, console)
    return Written(
        target=target,
        parameters=count_parameters(source.config),
        bytes=writer.total_bytes,
        files=len(writer.files),
        seconds=seconds,
    )


def tell_dropped(source: Source, console: Console) -> None:
    """Say what of a training run is not written: all but its model."""
    if source.has_optimizer_state:
        console.say(
            f"{source.path}: its optimizer's state, its schedule and its iteration are dropped; "
            "training starts anew from what is written"
        )


def _tell_about_stock(config: ModelConfig, console: Console) -> None:
    """Say what stock Megatron-LM would silently compute differently (docs/stock_megatron.md)."""
    if flags := stock_flags(config):
        console.say(
            "stock Megatron-LM does not read these from a checkpoint, give them beside "
            f"--use-checkpoint-args: {' '.join(flags)}"
        )
    for lost in beyond_stock(config):
        console.say(f"warning: stock Megatron-LM has no argument for {lost}")
