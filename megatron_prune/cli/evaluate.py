"""Judge a model on a text: loss, perplexity, bits per byte.

Takes any checkpoint at any layout: a model stored at TP=8 is evaluated alone or by as many
processes as torchrun starts. The text is tokenised once with the model's own tokenizer, without
special tokens, and cut into windows of --seq-length tokens that do not overlap.

With --domains instead of --data: the loss on each domain's validation part, on the windows that
`train --domains` looks at under the same --seq-length, --split and --seed. With --tasks the model
answers benchmark questions instead, through lm-evaluation-harness.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from megatron_prune.cli.domain_flags import DOMAIN_FLAGS, add_domain_evaluation, run_domains
from megatron_prune.cli.engine_flags import add_engine, dtype_of, process_groups
from megatron_prune.cli.options import check_output_file, grid_from, positive
from megatron_prune.cli.tasks import TASK_FLAGS, add_task_arguments, run_tasks
from megatron_prune.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", type=Path, required=True, metavar="CKPT_OR_HF", help="checkpoint of any format"
    )
    parser.add_argument("--data", type=Path, help="text, or JSON lines with 'text'")
    parser.add_argument(
        "--seq-length",
        type=positive,
        metavar="N",
        help="of a window (default 1024); with --tasks at most (default: all the model takes)",
    )
    parser.add_argument("--max-windows", type=positive, metavar="N", help="the first N only")
    parser.add_argument(
        "--micro-batch-size", type=positive, default=1, metavar="N", help="default 1"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here too")
    parser.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", help="default: the checkpoint's own"
    )
    add_domain_evaluation(parser)
    add_task_arguments(parser)
    parser.add_argument(
        "--save", type=Path, metavar="JSON", help="results of --tasks, or of --per-domain"
    )
    add_engine(parser)


_GOES_WITH = {
    "json": ("data",),
    "max_windows": ("data", "domains"),
    "save": ("domains", "tasks"),
    **dict.fromkeys(DOMAIN_FLAGS, ("domains",)),
    **dict.fromkeys(TASK_FLAGS, ("tasks",)),
}


def _chosen(args: argparse.Namespace) -> str:
    """What the model is judged on: ``data``, ``domains`` or ``tasks``.

    Raises:
        ConfigError: none of them or several, or a flag of another.
    """
    given = [name for name in ("data", "domains", "tasks") if getattr(args, name) is not None]
    if len(given) != 1:
        found = " and ".join(f"--{name}" for name in given) or "nothing to judge it on"
        raise ConfigError(f"{found}: give one of --data TEXT, --domains RECIPE and --tasks NAMES")
    for name, goes in _GOES_WITH.items():
        if given[0] not in goes and getattr(args, name) not in (None, False):
            flags = " or ".join(f"--{one}" for one in goes)
            raise ConfigError(f"--{name.replace('_', '-')} goes with {flags}")
    if given[0] == "domains" and args.save is not None and not args.per_domain:
        raise ConfigError("--save writes the loss of each domain; add --per-domain")
    return given[0]


def run(args: argparse.Namespace) -> None:
    chosen = _chosen(args)
    if chosen == "domains":
        run_domains(args)
        return
    if chosen == "tasks":
        run_tasks(args)
        return
    from megatron_prune.engine.groups import data_parallel_size, world_size
    from megatron_prune.evaluate.text import EvaluationOptions, evaluate, open_checked

    grid = grid_from(args)
    data_parallel_size(grid, world_size())
    options = EvaluationOptions(
        load=args.load,
        data=args.data,
        seq_length=args.seq_length or 1024,
        max_windows=args.max_windows,
        micro_batch_size=args.micro_batch_size,
        tokenizer_model=args.tokenizer_model,
        dtype=dtype_of(args),
        transformer_impl=args.transformer_impl,
        sequence_parallel=args.sequence_parallel,
        family=args.family,
    )
    if args.json is not None:
        inputs = (args.load, args.data, args.tokenizer_model)
        check_output_file(args.json, overwrite=True, inputs=inputs, flag="--json")
    started = time.monotonic()
    source = open_checked(options, grid)
    with process_groups(args, grid) as groups:
        result = evaluate(source, options, groups)
        if groups.ranks.is_first:
            _tell(result, args, time.monotonic() - started)


def _tell(result: dict[str, float | int | str], args: argparse.Namespace, seconds: float) -> None:
    from megatron_prune.files import replace_file

    for name in ("loss", "perplexity", "bits_per_byte"):
        print(f"{name:<14} {result[name]:.6f}")
    for name in ("tokens", "windows"):
        print(f"{name:<14} {result[name]}")
    print(f"{'tokens/s':<14} {result['tokens_per_second']:.1f}")
    print(f"{'seconds':<14} {result['seconds']:.2f}")
    print(f"{seconds:.1f} s in all, with loading and tokenising", file=sys.stderr)
    if args.json is not None:
        replace_file(args.json, (json.dumps(result, indent=1) + "\n").encode())
