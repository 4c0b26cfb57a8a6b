"""One page that shows scores, plans, searches, training runs and judged models, by itself.

  megatron-prune report scores.safetensors plan.json --save report.html
  megatron-prune report pruned=/ckpt/recovered random=/ckpt/random dense=dense.json \\
      pruned.json plan.json --load llama --save report.html --png-dir figures --csv-dir numbers

Files are recognised by what they hold, in any order: at most one of scores, any number of plans,
candidates, runs of train (their directories) and results of evaluate. NAME=PATH gives one another
name. The page opens in any browser, light or dark, offline, and prints.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.errors import PlanError
from megatron_prune.families import FAMILIES
from megatron_prune.files import replace_file
from megatron_prune.model.shape import ModelConfig
from megatron_prune.report.inputs import Inputs, read_inputs, split_name
from megatron_prune.report.page import (
    beside_files,
    check_directory,
    page_html,
    with_unique_names,
    write_beside,
)
from megatron_prune.report.sections import report_sections


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="[NAME=]PATH",
        help="scores, plan, candidates of a budget search, a run, or a result of evaluate",
    )
    parser.add_argument("--save", type=Path, required=True, metavar="HTML", help="the page")
    parser.add_argument(
        "--png-dir", type=Path, metavar="DIR", help="also write every picture as PNG, data as CSV"
    )
    parser.add_argument(
        "--csv-dir", type=Path, metavar="DIR", help="the data as CSV here, not beside the PNGs"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--load", type=Path, metavar="SRC", help="the source model, for exact parameters and bytes"
    )
    parser.add_argument(
        "--family", choices=FAMILIES, help="of a stock Megatron checkpoint in --load"
    )


def _check_outputs(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    inputs = (*(path for path in paths if path.is_file()), args.load)
    options.check_output_file(args.save, overwrite=args.overwrite, inputs=inputs)
    for flag, directory in (("--png-dir", args.png_dir), ("--csv-dir", args.csv_dir)):
        if directory is not None:
            options.check_not_input(flag, directory, inputs)
            check_directory(directory, flag)


def _model(args: argparse.Namespace, inputs: Inputs) -> ModelConfig | None:
    """The configuration of ``--load``, which has to be the model that the inputs are about."""
    if args.load is None:
        return None
    with options.opened(args.load, args.family) as source:
        found, wanted = source.digest, inputs.source_digest
        if wanted is not None and found != wanted:
            raise PlanError(
                f"--load {args.load}: is model {found[:16]}, the inputs are about model "
                f"{wanted[:16]} (source_digest); give the model they were made from"
            )
        return source.config


def run(args: argparse.Namespace) -> None:
    names, paths = zip(*map(split_name, args.inputs))
    _check_outputs(args, paths)
    inputs = read_inputs(paths, names)
    sections = with_unique_names(report_sections(inputs, _model(args, inputs)))
    title = "Pruning report" if inputs.source is not None or inputs.searches else "Training report"
    page = page_html(title, ", ".join(file.label for file in inputs.files), sections).encode()
    files = beside_files(sections)
    numbers = [name for name in files if name.endswith(".csv")]
    pictures = [name for name in files if name not in numbers]
    where = {"--png-dir": (args.png_dir, pictures), "--csv-dir": (args.csv_dir, numbers)}
    if args.csv_dir is None:
        where = {"--png-dir": (args.png_dir, [*files])}
    for flag, (directory, wanted) in where.items():
        if directory is not None:
            chosen = {name: files[name] for name in wanted}
            write_beside(directory, chosen, flag=flag, overwrite=args.overwrite)
            options.show(f"wrote {len(chosen)} files into {directory}")
    replace_file(args.save, page)
    options.show(f"wrote {args.save}: {len(page) / 1e6:.2f} MB")
