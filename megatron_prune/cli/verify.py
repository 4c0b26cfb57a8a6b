"""Check a pruned checkpoint against its source and its plan, value by value.

  megatron-prune verify --load llama-pruned --source llama --plan plan.json

Exits 3 at the first difference and names it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from megatron_prune.cli import options
from megatron_prune.model.axes import count_parameters
from megatron_prune.planning.plan import load_plan
from megatron_prune.ranks import is_first_rank
from megatron_prune.sources.pruned import check_plan_fits
from megatron_prune.verify import verify


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    parser.add_argument("--source", type=Path, required=True, metavar="SRC", help="what was pruned")
    parser.add_argument("--plan", type=Path, required=True, metavar="PLAN", help="plan file")


def run(args: argparse.Namespace) -> None:
    plan = load_plan(args.plan)
    with (
        options.opened(args.load, args.family) as pruned,
        options.opened(args.source, args.family) as source,
    ):
        check_plan_fits(source, plan)
        total = count_parameters(replace(source.config, shape=plan.target))
        with tqdm(total=total, desc="verify", unit_scale=True, disable=not is_first_rank()) as bar:
            verdict = verify(pruned, source, plan, bar.update)
    files = "no manifest" if verdict.files is None else f"{verdict.files} files as in the manifest"
    repaired = f" ({verdict.repaired} repaired as recorded)" if verdict.repaired else ""
    options.show(
        f"{args.load}: {verdict.tensors} tensors{repaired}, {verdict.values:,} values as planned; "
        f"{files}"
    )
