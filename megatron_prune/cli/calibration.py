"""Text that is run through a model on the way to a checkpoint: its flags, windows and layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.cli import options
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.sources.source import Source

if TYPE_CHECKING:
    from torch import Tensor

_SEQ_LENGTH = 1024


def add_calibration_arguments(group: argparse._ArgumentGroup) -> None:
    """``--data`` and how it is run."""
    group.add_argument("--data", type=Path, metavar="CALIB", help="text, or JSON lines with 'text'")
    group.add_argument(
        "--num-samples", type=options.positive, default=128, metavar="N", help="windows of CALIB"
    )
    group.add_argument(
        "--seq-length",
        type=options.positive,
        metavar="N",
        help=f"tokens of a window (default: {_SEQ_LENGTH}, or what the model takes)",
    )
    group.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", help="default: the source's own"
    )
    group.add_argument("--bf16", action="store_true", help="calibrate in bfloat16 (default fp32)")
    group.add_argument(
        "--distributed-timeout-minutes", type=float, default=30, metavar="M", help="default 30"
    )


def longest_window(source: Source) -> int:
    """The default of ``--seq-length``."""
    config = source.config
    window = config.sliding_window or config.max_position_embeddings
    return min(_SEQ_LENGTH, config.max_position_embeddings, window)


def calibration_grid(size: int | None, args: argparse.Namespace, source: Source) -> ParallelGrid:
    """The layout of a run that keeps one layer in memory: tensor parallel, the rest data parallel.

    Args:
        size: asked for; None for the target's TP where it divides ranks and source, else 1.
    """
    from megatron_prune.engine.groups import world_size

    if size is None:
        size = args.tensor_model_parallel_size
        legal = source.config.shape.legal_tensor_parallel_sizes()
        size = size if world_size() % size == 0 and size in legal else 1
    return ParallelGrid(tensor_parallel=size)


def calibration_windows(args: argparse.Namespace, source: Source, seq_length: int) -> Tensor:
    """[W, S] int64 token ids of ``--data``."""
    from megatron_prune.data.windows import model_windows

    windows, _ = model_windows(
        args.data,
        args.tokenizer_model or args.load,
        seq_length=seq_length,
        max_windows=args.num_samples,
        vocab_size=source.config.shape.vocab_size,
    )
    if len(windows) < args.num_samples:
        options.say(f"{args.data}: {len(windows)} windows, fewer than --num-samples")
    return windows
