"""Domains on the command line: flags of `train`, and `evaluate --domains`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_prune.cli.engine_flags import dtype_of, process_groups
from megatron_prune.cli.options import check_output_file, grid_from, positive


def add_domains(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("domains, instead of --data-path")
    group.add_argument(
        "--domains", type=Path, metavar="YAML", help="domains, their corpora, weights and targets"
    )
    group.add_argument(
        "--domain-weighting",
        default="dynamic",
        metavar="HOW",
        help="dynamic (default): towards domains above their target; or constant",
    )
    group.add_argument(
        "--domain-update-interval",
        type=positive,
        default=400,
        metavar="N",
        help="steps between changes of the weights (default 400)",
    )
    group.add_argument(
        "--domain-eta", type=float, default=1.0, help="how strongly losses count (default 1)"
    )
    group.add_argument(
        "--domain-smoothing",
        type=float,
        default=1e-4,
        metavar="SHARE",
        help="spread evenly over all domains (default 1e-4)",
    )
    group.add_argument(
        "--domain-weight-floor", type=float, default=0.0, metavar="SHARE", help="default 0"
    )
    group.add_argument(
        "--domain-weight-cap", type=float, default=1.0, metavar="SHARE", help="default 1"
    )
    group.add_argument(
        "--domain-clip",
        action="store_true",
        help="do not take weight from domains below their target",
    )


DOMAIN_FLAGS = ("per_domain", "split", "seed", "eod_mask_loss", "data_cache_path")


def add_domain_evaluation(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("domains, instead of --data")
    group.add_argument("--domains", type=Path, metavar="YAML", help="the recipe of `train`")
    group.add_argument(
        "--per-domain",
        action="store_true",
        help="tell the loss of each domain; --save keeps them: targets for `train`",
    )
    group.add_argument("--split", metavar="SHARES", help="default 969,30,1, as in `train`")
    group.add_argument("--seed", type=int, metavar="N", help="default 1234, as in `train`")
    group.add_argument(
        "--eod-mask-loss", action="store_true", help="do not count the prediction of EOD"
    )
    group.add_argument(
        "--data-cache-path", type=Path, metavar="DIR", help="sample indices; default: not kept"
    )


def run_domains(args: argparse.Namespace) -> None:
    """`evaluate --domains`."""
    from megatron_prune.engine.groups import data_parallel_size, world_size
    from megatron_prune.evaluate.domains import (
        DomainEvaluationOptions,
        evaluate_domains,
        open_for_domains,
    )
    from megatron_prune.files import replace_file

    grid = grid_from(args)
    data_parallel_size(grid, world_size())
    options = DomainEvaluationOptions(
        load=args.load,
        domains=args.domains,
        seq_length=args.seq_length or 1024,
        max_windows=args.max_windows,
        micro_batch_size=args.micro_batch_size,
        seed=1234 if args.seed is None else args.seed,
        split=args.split or "969,30,1",
        eod_mask_loss=args.eod_mask_loss,
        data_cache_path=args.data_cache_path,
        tokenizer_model=args.tokenizer_model,
        dtype=dtype_of(args),
        transformer_impl=args.transformer_impl,
        sequence_parallel=args.sequence_parallel,
        family=args.family,
    )
    if args.save is not None:
        inputs = (args.load, args.domains, args.tokenizer_model)
        check_output_file(args.save, overwrite=True, inputs=inputs)
    source = open_for_domains(options, grid)
    with process_groups(args, grid) as groups:
        result = evaluate_domains(source, options, groups)
        if not groups.ranks.is_first:
            return
        if args.per_domain:
            for name, row in result["domains"].items():
                print(f"{name:<14} {row['loss']:.6f}  {row['tokens']} tokens")
        print(f"{'loss':<14} {result['loss']:.6f}")
        if args.save is not None:
            replace_file(args.save, (json.dumps(result, indent=1) + "\n").encode())
