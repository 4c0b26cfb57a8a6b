"""Let any checkpoint continue a text, for a quick look at what the model says.

  megatron-prune generate --load /ckpt/pruned --prompt "The capital of France is"
  torchrun --nproc-per-node 3 -m megatron_prune generate --load /ckpt/recovered \\
      --tensor-model-parallel-size 3 --prompt-file question.txt --chat --temperature 0.7

Greedy unless a temperature is given. Every new token costs a pass over the whole text: fine for a
look at a few sentences, not for serving.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.cli.engine_flags import add_engine, dtype_of, process_groups
from megatron_prune.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", type=Path, required=True, metavar="CKPT_OR_HF", help="checkpoint of any format"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a file that holds it")
    parser.add_argument(
        "--chat",
        "--apply-chat-template",
        action="store_true",
        help="ask as a user does, with the model's chat template",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=options.positive,
        default=64,
        metavar="N",
        help="at most (default 64)",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)"
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest (default all)"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest that together have probability P (default 1: all)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the drawing (default 1234)")
    parser.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", help="default: the checkpoint's own"
    )
    add_engine(parser)


def _prompt(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        return str(args.prompt)
    try:
        return str(args.prompt_file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompt-file {args.prompt_file}: {error}; wanted a text in UTF-8"
        ) from None


def run(args: argparse.Namespace) -> None:
    from megatron_prune.engine.forward.sampling import Sampling
    from megatron_prune.engine.groups import data_parallel_size, world_size
    from megatron_prune.evaluate.generation import GenerationOptions, generate, open_for_generation

    grid = options.grid_from(args)
    data_parallel_size(grid, world_size())
    wanted = GenerationOptions(
        load=args.load,
        prompt=_prompt(args),
        max_new_tokens=args.max_new_tokens,
        sampling=Sampling(
            temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed
        ),
        chat=args.chat,
        tokenizer_model=args.tokenizer_model,
        dtype=dtype_of(args),
        transformer_impl=args.transformer_impl,
        sequence_parallel=args.sequence_parallel,
        family=args.family,
    )
    source = open_for_generation(wanted, grid)
    began = time.monotonic()
    with process_groups(args, grid) as groups:
        found = generate(source, wanted, groups)
    options.show(found.text)
    why = "the model ended it" if found.is_ended else "--max-new-tokens reached"
    options.say(f"{len(found.tokens)} tokens in {time.monotonic() - began:.1f} s; {why}")
