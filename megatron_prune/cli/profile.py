"""Measure how long a layer takes on this machine, for `plan --target-latency`.

  megatron-prune profile --load llama --save latency.json --seq-length 4096 --bf16
  megatron-prune plan --load llama --save plan.json --target-latency 120ms \\
      --latency-table latency.json

Times a forward of --batch-size sequences through one layer at several sizes, and through the output
layer, with random weights; reads the checkpoint's configuration only. Run it alone on the machine,
with the threads, the dtype and (under torchrun) the tensor-parallel size the model will have.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.cli.engine_flags import add_engine, dtype_of, process_groups
from megatron_prune.files import replace_file
from megatron_prune.planning.latency import LatencyTable, fit_latency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", type=Path, required=True, metavar="CKPT_OR_HF", help="checkpoint of any format"
    )
    parser.add_argument("--save", type=Path, required=True, metavar="TABLE", help="JSON file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing table")
    parser.add_argument(
        "--seq-length", type=options.positive, default=1024, metavar="N", help="default: 1024"
    )
    parser.add_argument(
        "--batch-size", type=options.positive, default=1, metavar="N", help="default: 1"
    )
    parser.add_argument(
        "--repeats",
        type=options.positive,
        default=5,
        metavar="N",
        help="timed forwards of each size; the median counts (default: 5)",
    )
    add_engine(parser)


def run(args: argparse.Namespace) -> None:
    options.check_output_file(args.save, overwrite=args.overwrite, inputs=(args.load,))
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.forward.model import ModelOptions, check_model
    from megatron_prune.engine.groups import data_parallel_size, world_size
    from megatron_prune.engine.profile import measure_table

    grid = options.grid_from(args)
    data_parallel_size(grid, world_size())
    model_options = ModelOptions(
        seq_length=args.seq_length,
        dtype=dtype_of(args),
        transformer_impl=args.transformer_impl,
        sequence_parallel=args.sequence_parallel,
    )
    with options.opened(args.load, args.family) as source:
        config = source.config
    config.shape.check_uniform("profile", "profile its source")
    grid.check(config.shape)
    check_model(config, model_options, grid.tensor_parallel)
    with process_groups(args, grid) as groups:
        options.agree_on_arguments(groups.ranks, args)
        table = measure_table(
            config,
            groups,
            model_options,
            batch_size=args.batch_size,
            repeats=args.repeats,
            progress=options.say,
        )
        on_first_rank(groups.ranks, lambda: replace_file(args.save, table.to_json().encode()))
    _show(table)


def _show(table: LatencyTable) -> None:
    """What was measured beside what the fitted line says."""
    model = fit_latency(table)
    fixed = {"K": 0, "V": 0, "L": 1}
    options.show(
        f"{table.device}, {table.threads} threads, {table.dtype}, {table.batch_size} x "
        f"{table.seq_length} tokens, TP {table.tensor_parallel}"
    )
    options.show(
        f"{'hidden':>8}{'heads':>8}{'groups':>8}{'ffn':>8}{'ms':>10}{'fitted':>10}{'TFLOP/s':>10}"
    )
    width = table.kv_channels
    for row in table.layers:
        sizes = {**fixed, "D": row.hidden, "Q": row.heads, "K": row.groups, "F": row.ffn}
        fitted = float(model.seconds_at(sizes)) - model.output[0]
        per_token = row.hidden * (2 * width * (row.heads + row.groups) + 3 * row.ffn)
        flops = 2 * table.tokens * (per_token + row.heads * width * table.seq_length)
        options.show(
            f"{row.hidden:>8}{row.heads:>8}{row.groups:>8}{row.ffn:>8}{row.seconds * 1e3:>10.3f}"
            f"{fitted * 1e3:>10.3f}{flops / row.seconds / 1e12:>10.3f}"
        )
    for out in table.outputs:
        options.show(
            f"output layer: hidden {out.hidden}, vocabulary {out.vocab}: {out.seconds * 1e3:.3f} ms"
        )
    options.show(f"largest error of the fit: {model.worst_error:.1%}")
