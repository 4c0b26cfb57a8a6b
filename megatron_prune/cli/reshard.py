"""Change the tensor- and pipeline-parallel layout, or the format, of a Megatron checkpoint.

megatron-prune reshard --load ckpt-tp8 --save ckpt-tp2 --tensor-model-parallel-size 2
"""

from __future__ import annotations

import argparse

from megatron_prune.cli import options
from megatron_prune.cli.writing import write
from megatron_prune.errors import ConfigError
from megatron_prune.surgery import Target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    options.add_save(parser)
    options.add_layout(parser)
    options.add_megatron_format(parser, default=None)


def run(args: argparse.Namespace) -> None:
    options.check_save(args)
    with options.opened(args.load, args.family) as source:
        if source.format == "hf":
            raise ConfigError(
                f"--load {args.load}: is a Hugging Face directory; use convert --to megatron"
            )
        target = Target(
            directory=args.save,
            format=args.ckpt_format or source.format,
            grid=options.grid_from(args),
            te_norms=args.transformer_impl == "transformer_engine",
        )
        write("reshard", args, source, target)
