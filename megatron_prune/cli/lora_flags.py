"""Flags of ``train`` for low-rank adaptation."""

from __future__ import annotations

import argparse

from megatron_prune.cli.options import positive
from megatron_prune.errors import ConfigError
from megatron_prune.model.lora import TARGETS, Lora, parse_targets


def add_lora(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "low-rank adaptation (LoRA)",
        "the weights stay as they are, W + ALPHA / R * B @ A is used; only A and B are trained",
    )
    group.add_argument("--lora-rank", type=positive, metavar="R", help="train factors of this rank")
    group.add_argument(
        "--lora-alpha",
        type=float,
        metavar="ALPHA",
        help="default R: factors count once, as with peft's own defaults of 8 and 8",
    )
    group.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="LINEAR",
        help=f"some of {', '.join(TARGETS)}; default: all",
    )
    group.add_argument(
        "--lora-keep-zeros", action="store_true", help="weights that are zero stay zero"
    )


def lora_from(args: argparse.Namespace) -> Lora | None:
    """What the flags ask for; None without a rank.

    Raises:
        ConfigError: a flag that needs ``--lora-rank``, or unknown targets.
    """
    if args.lora_rank is None:
        given = {
            "--lora-alpha": args.lora_alpha is not None,
            "--lora-targets": args.lora_targets is not None,
            "--lora-keep-zeros": args.lora_keep_zeros,
        }
        for flag, is_given in given.items():
            if is_given:
                raise ConfigError(f"{flag} needs --lora-rank R: without it there are no factors")
        return None
    return Lora(
        rank=args.lora_rank,
        alpha=float(args.lora_rank if args.lora_alpha is None else args.lora_alpha),
        targets=TARGETS if args.lora_targets is None else parse_targets(args.lora_targets),
        keep_zeros=args.lora_keep_zeros,
    )
