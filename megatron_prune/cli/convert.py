"""Convert a checkpoint between Hugging Face and Megatron, at any TP and PP, without loss.

  megatron-prune convert --load llama --save llama-tp8 --to megatron --tensor-model-parallel-size 8
  megatron-prune convert --load llama-tp8 --save llama-hf --to hf

Under torchrun the ranks share the files; the result is the same.
"""

from __future__ import annotations

import argparse

from megatron_prune.cli import options
from megatron_prune.cli.writing import write


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    options.add_save(parser)
    options.add_target(parser)


def run(args: argparse.Namespace) -> None:
    target = options.target_from(args)
    options.check_save(args)
    with options.opened(args.load, args.family) as source:
        write("convert", args, options.cast(source, args.dtype), target)
