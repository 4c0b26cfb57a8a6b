"""Change the tensor- and pipeline-parallel layout, or the format, of a Megatron checkpoint.

  megatron-prune reshard --load ckpt-tp8 --save ckpt-tp2 --tensor-model-parallel-size 2

A training run of `train` stays one where source and target are torch_dist: its optimizer's state,
schedule and iteration go along, and `train --load DST` goes on with it. The legacy format, a run of
stock Megatron and one with --lora-rank, whose factors are merged, leave the model alone; the
command says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag
from megatron_prune.model.grid import Layout
from megatron_prune.stages.common import (
    FORMATS,
    LegacyNames,
    Saves,
    check_save,
    opened,
)
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.writing import Written, tell_dropped, write
from megatron_prune.store.training import saved_run
from megatron_prune.surgery import Target


@dataclass(frozen=True, kw_only=True)
class ReshardOptions(LegacyNames, Layout, Saves):
    ckpt_format: str | None = flag(
        "Megatron's formats: distributed or legacy (default: the source's)",
        default=None,
        choices=FORMATS,
    )
    no_optim: bool = flag(
        "of a training run leave optimizer, schedule and iteration", default=False
    )


def reshard(options: ReshardOptions, console: Console = SILENT) -> Written:
    """Write a Megatron checkpoint in another layout or format; see `write`.

    Raises:
        ConfigError: the source is a Hugging Face directory, or the output holds the input.
    """
    check_save(options.save, options.load, overwrite=options.overwrite)
    with opened(options.load, options.family) as source:
        if source.format == "hf":
            raise ConfigError(
                f"--load {options.load}: is a Hugging Face directory; use convert --to megatron"
            )
        to = options.ckpt_format or source.format
        run = None
        if (source.format, to, options.no_optim) == ("torch_dist", "torch_dist", False):
            run = saved_run(source.path)
        target = Target(
            directory=options.save, format=to, grid=options.grid, te_norms=options.te_norms, run=run
        )
        if run is None:
            tell_dropped(source, console)
        return write("reshard", options, source, target, console)
