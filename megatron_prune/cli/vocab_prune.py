"""Cut a model to the tokens of a plan: tokenizer files, embedding and output layer together.

  megatron-prune vocab prune --load llama --plan vocab_plan.json --save llama-16k --to hf
  torchrun --nproc-per-node 8 -m megatron_prune vocab prune --load llama-tp8 \\
      --plan vocab_plan.json --save llama-16k-tp8 --to megatron --tensor-model-parallel-size 8

Streams as prune does, from and to any format and layout. All token ids in config.json and
generation_config.json follow; plan.json and vocab_plan.json beside the weights say which tokens
stayed. With heads, channels or layers in the same pass: prune --vocab-plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.cli.prune import write_pruned
from megatron_prune.cli.publishing import add_publishing_arguments, check_publishing, publish
from megatron_prune.cli.vocabulary import add_tokenizer, cut_vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    options.add_save(parser)
    parser.add_argument(
        "--plan", type=Path, required=True, metavar="PLAN", help="of `megatron-prune vocab plan`"
    )
    add_tokenizer(parser, "--tokenizer", "--vocab-tokenizer")
    options.add_target(parser)
    add_publishing_arguments(parser)


def run(args: argparse.Namespace) -> None:
    target = options.target_from(args)
    options.check_save(args)
    check_publishing(args)
    with (
        options.opened(args.load, args.family) as source,
        cut_vocabulary(args.plan, args.vocab_tokenizer, source, None) as cut,
    ):
        write_pruned(args, target, source, cut, repairs=False)
    publish(args)
