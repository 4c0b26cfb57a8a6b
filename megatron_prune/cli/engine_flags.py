"""Flags that `train` and `evaluate` share: the layout, the precision, and how the layers run."""

from __future__ import annotations

import argparse

from megatron_prune.grid import ParallelGrid


def add_layout_flags(parser: argparse.ArgumentParser) -> None:
    """TP, PP and uneven stages; processes beyond TP x PP are data-parallel copies."""
    group = parser.add_argument_group("layout")
    group.add_argument("--tensor-model-parallel-size", type=int, default=1, metavar="N")
    group.add_argument("--pipeline-model-parallel-size", type=int, default=1, metavar="N")
    group.add_argument("--decoder-first-pipeline-num-layers", type=int, metavar="N")
    group.add_argument("--decoder-last-pipeline-num-layers", type=int, metavar="N")
    group.add_argument(
        "--sequence-parallel", action="store_true", help="split norms over tensor-parallel ranks"
    )
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=10,
        metavar="M",
        help="give up on a silent rank after this long",
    )


def add_precision_flags(parser: argparse.ArgumentParser) -> None:
    """fp32 unless asked; which layers run the model."""
    group = parser.add_argument_group("precision and layers")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--bf16", action="store_true", help="weights and activations in bfloat16")
    choice.add_argument("--fp16", action="store_true", help="... in float16")
    group.add_argument(
        "--transformer-impl",
        default="auto",
        metavar="IMPL",
        help="auto (default), local or transformer_engine",
    )
    group.add_argument(
        "--family", metavar="NAME", help="of a stock checkpoint whose arguments do not tell"
    )


def grid_of(args: argparse.Namespace) -> ParallelGrid:
    """The layout asked for."""
    return ParallelGrid(
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
        first_stage_layers=args.decoder_first_pipeline_num_layers,
        last_stage_layers=args.decoder_last_pipeline_num_layers,
    )


def dtype_of(args: argparse.Namespace) -> str:
    """fp32, bf16 or fp16."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
