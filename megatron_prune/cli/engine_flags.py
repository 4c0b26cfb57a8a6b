"""Flags of the stages that run a model, beyond `options`: processes, precision, layers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from megatron_prune.cli.options import add_layout
from megatron_prune.families import FAMILIES
from megatron_prune.model.grid import ParallelGrid

if TYPE_CHECKING:
    from megatron_prune.engine.groups import Groups


def add_engine(parser: argparse.ArgumentParser, *, family: bool = True) -> None:
    """The layout, how long to wait for a rank, the precision and the kind of layers.

    Args:
        family: ``--family`` too, for stages that do not take it from `options.add_load`.
    """
    add_layout(parser)
    group = parser.add_argument_group("processes, precision and layers")
    group.add_argument(
        "--sequence-parallel", action="store_true", help="split norms over tensor-parallel ranks"
    )
    group.add_argument(
        "--distributed-timeout-minutes",
        type=float,
        default=10,
        metavar="M",
        help="give up on a silent rank after this long (default 10)",
    )
    precision = group.add_mutually_exclusive_group()
    precision.add_argument("--bf16", action="store_true", help="run in bfloat16 (default fp32)")
    precision.add_argument("--fp16", action="store_true", help="run in float16")
    group.add_argument(
        "--transformer-impl",
        choices=("auto", "local", "transformer_engine"),
        default="auto",
        help="auto: Transformer Engine where it is installed and a GPU is there",
    )
    if family:
        group.add_argument(
            "--family",
            choices=FAMILIES,
            help="of a stock Megatron checkpoint whose arguments do not tell",
        )


def dtype_of(args: argparse.Namespace) -> str:
    """fp32, bf16 or fp16."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


@contextmanager
def process_groups(args: argparse.Namespace, grid: ParallelGrid, **more: Any) -> Iterator[Groups]:
    """`model_parallel` as the flags ask, in which a failure is told with its rank's name."""
    from megatron_prune.engine.failures import named_failures
    from megatron_prune.engine.groups import model_parallel

    timeout = args.distributed_timeout_minutes
    with named_failures(), model_parallel(grid, timeout_minutes=timeout, **more) as groups:
        yield groups
