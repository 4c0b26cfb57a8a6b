"""The flags that scoring takes, of `score` and of `plan --rounds`, and what they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.cli import options
from megatron_prune.cli.calibration import calibration_windows
from megatron_prune.cli.engine_flags import dtype_of
from megatron_prune.criteria import SCORED
from megatron_prune.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.engine.observe.score import ScoreOptions
    from megatron_prune.model.shape import ModelConfig
    from megatron_prune.sources.source import Source

_SEQ_LENGTH = 4096


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, how much of it, and what removing layers costs."""
    group = parser.add_argument_group("calibration")
    group.add_argument("--data", type=Path, metavar="CALIB", help="text, or JSON lines with 'text'")
    group.add_argument(
        "--num-samples",
        type=options.positive,
        default=1024,
        metavar="N",
        help="at most (default 1024)",
    )
    group.add_argument(
        "--seq-length",
        type=options.positive,
        metavar="N",
        help=f"of a sample (default: {_SEQ_LENGTH}, or what the model takes)",
    )
    group.add_argument(
        "--micro-batch-size", type=options.positive, default=1, metavar="N", help="default 1"
    )
    group.add_argument(
        "--removal-samples",
        type=options.positive,
        default=8,
        metavar="N",
        help="samples of perplexity: it runs them once for each layer (default 8)",
    )
    group.add_argument(
        "--removal-layers",
        type=options.positive,
        metavar="N",
        help="layers that perplexity-greedy removes (default: a quarter)",
    )
    group.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", help="default: the checkpoint's own"
    )


def check_data(args: argparse.Namespace, criteria: Sequence[str]) -> None:
    """Refuse criteria that look at text when there is none, before the source is opened."""
    text = [name for name in criteria if SCORED[name].is_observed]
    if text and args.data is None:
        raise ConfigError(f"--data is missing: {', '.join(text)} look at the model at work on text")
    for path in (args.data, args.tokenizer_model):
        if path is not None and not path.exists():
            raise ConfigError(f"{path}: is not there")


def score_options(
    args: argparse.Namespace, criteria: Sequence[str], config: ModelConfig
) -> ScoreOptions:
    """How to score a model, as the flags say."""
    from megatron_prune.engine.forward.model import ModelOptions
    from megatron_prune.engine.observe.score import ScoreOptions

    return ScoreOptions(
        criteria=tuple(criteria),
        model=ModelOptions(
            seq_length=_seq_length(args, config),
            dtype=dtype_of(args),
            transformer_impl=args.transformer_impl,
            sequence_parallel=args.sequence_parallel,
        ),
        micro_batch_size=args.micro_batch_size,
        removal_samples=args.removal_samples,
        removal_layers=args.removal_layers,
    )


def _seq_length(args: argparse.Namespace, config: ModelConfig) -> int:
    """What the flag says; without it no more than the model takes."""
    if args.seq_length is not None:
        return int(args.seq_length)
    takes = min(config.max_position_embeddings, config.sliding_window or _SEQ_LENGTH)
    if takes >= _SEQ_LENGTH:
        return _SEQ_LENGTH
    if args.data is not None:
        options.say(f"--seq-length {takes}: as much as the model takes")
    return takes


def score_windows(args: argparse.Namespace, source: Source, seq_length: int) -> Tensor | None:
    """[W, S] int64 tokens of ``--data``; None without."""
    return None if args.data is None else calibration_windows(args, source, seq_length)
