"""Convert a checkpoint between Hugging Face and Megatron, at any TP and PP, without loss.

  megatron-prune convert --load llama --save llama-tp8 --to megatron --tensor-model-parallel-size 8
  megatron-prune convert --load llama-tp8 --save llama-hf --to hf
  megatron-prune convert --load llama --save llama-rotated --to hf --rotate --data calibration.jsonl

Under torchrun the ranks share the files; the result is the same.
"""

from __future__ import annotations

import argparse

from megatron_prune.cli import options
from megatron_prune.cli.publishing import add_publishing_arguments, check_publishing, publish
from megatron_prune.cli.rotating import add_rotation_arguments, check_rotation, rotated, unrotated
from megatron_prune.cli.writing import write
from megatron_prune.surgery import Target, make_writer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    options.add_save(parser)
    options.add_target(parser)
    add_publishing_arguments(parser)
    add_rotation_arguments(parser)


def run(args: argparse.Namespace) -> None:
    target = options.target_from(args)
    options.check_save(args)
    rotates = check_rotation(args)
    check_publishing(args)
    _convert(args, target, rotates)
    publish(args)


def _convert(args: argparse.Namespace, target: Target, rotates: bool) -> None:
    with options.opened(args.load, args.family) as source:
        if not rotates:
            write("convert", args, options.cast(source, args.dtype), target)
            return
        same = options.cast(unrotated(source), args.dtype)
        make_writer(same, target)  # refuses what cannot be written, before the calibration
        if args.dry_run:
            write("convert", args, same, target)
            return
        with rotated(args, source) as found:
            out = options.cast(found.source, args.dtype)
            write("convert", args, out, target, ranks=found.ranks)
