"""Flags of ``train`` for learning from teachers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.cli.options import positive

if TYPE_CHECKING:
    from megatron_prune.engine.objectives.distill_options import DistillOptions


def add_distill(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "distillation",
        "loss = W x LM loss + (1 - W) x T^2 x KL(teacher || student), W the LM weight",
    )
    group.add_argument(
        "--teacher",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="learn from these models' predictions; any format and layout",
    )
    group.add_argument(
        "--teacher-weights",
        type=float,
        nargs="+",
        metavar="W",
        help="of several teachers' probabilities in their mixture; default: equal",
    )
    group.add_argument(
        "--distill-lm-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="share of the LM loss (default 0: the logits alone)",
    )
    group.add_argument(
        "--distill-temperature", type=float, default=1.0, metavar="T", help="default 1"
    )
    group.add_argument(
        "--distill-top-k",
        type=positive,
        metavar="K",
        help="the teacher's K likeliest tokens, the rest as one; default: all",
    )
    group.add_argument(
        "--distill-hidden-weight",
        type=float,
        default=0.0,
        metavar="W",
        help="of 1 - cosine of hidden states, added (default 0)",
    )
    group.add_argument(
        "--distill-hidden-layers",
        metavar="STUDENT:TEACHER,...",
        help="layers, from 0, whose outputs are compared",
    )


def distill_from(args: argparse.Namespace) -> DistillOptions | None:
    """What the flags ask for; None without a teacher.

    Raises:
        ConfigError: a flag that needs ``--teacher``, or a layer map that is none.
    """
    from megatron_prune.engine.objectives.distill_options import DistillOptions, parse_layers
    from megatron_prune.errors import ConfigError

    if args.teacher is None:
        given = {
            "--teacher-weights": args.teacher_weights is not None,
            "--distill-lm-weight": args.distill_lm_weight != 0,
            "--distill-temperature": args.distill_temperature != 1,
            "--distill-top-k": args.distill_top_k is not None,
            "--distill-hidden-weight": args.distill_hidden_weight != 0,
            "--distill-hidden-layers": args.distill_hidden_layers is not None,
        }
        for flag, is_given in given.items():
            if is_given:
                raise ConfigError(f"{flag} needs --teacher CKPT: there is nothing to learn from")
        return None
    weights, layers = args.teacher_weights, args.distill_hidden_layers
    return DistillOptions(
        teachers=tuple(args.teacher),
        teacher_weights=None if weights is None else tuple(weights),
        lm_weight=args.distill_lm_weight,
        temperature=args.distill_temperature,
        top_k=args.distill_top_k,
        hidden_weight=args.distill_hidden_weight,
        hidden_layers=() if layers is None else parse_layers(layers),
    )
