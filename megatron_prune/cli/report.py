"""One page that shows scores, plans and what a budget search tried, and needs nothing else.

  megatron-prune report scores.safetensors plan.json --save report.html
  megatron-prune report scores.safetensors plan.json candidates.json --load llama \\
      --save report.html --png-dir figures

Files are recognised by what they hold, in any order: at most one of scores, any number of plans
and candidates. The page opens in any browser, light or dark, offline, and prints.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.digest import source_digest
from megatron_prune.errors import PlanError
from megatron_prune.report.inputs import Inputs, read_inputs
from megatron_prune.report.page import check_directory, page_html, with_unique_names, write_beside
from megatron_prune.report.sections import report_sections
from megatron_prune.shape import ModelConfig
from megatron_prune.store.commit import replace_file
from megatron_prune.store.names import FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="scores, plan, or candidates of a budget search",
    )
    parser.add_argument("--save", type=Path, required=True, metavar="HTML", help="the page")
    parser.add_argument(
        "--png-dir", type=Path, metavar="DIR", help="also write every picture as PNG, data as CSV"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument(
        "--load", type=Path, metavar="SRC", help="the source model, for exact parameters and bytes"
    )
    parser.add_argument(
        "--family", choices=FAMILIES, help="of a stock Megatron checkpoint in --load"
    )


def _check_outputs(args: argparse.Namespace) -> None:
    inputs = (*(path for path in args.inputs if path.is_file()), args.load)
    options.check_output_file(args.save, overwrite=args.overwrite, inputs=inputs)
    if args.png_dir is not None:
        options.check_not_input("--png-dir", args.png_dir, inputs)
        check_directory(args.png_dir)


def _model(args: argparse.Namespace, inputs: Inputs) -> ModelConfig | None:
    """The configuration of ``--load``, which has to be the model that the inputs are about."""
    if args.load is None:
        return None
    with options.opened(args.load, args.family) as source:
        found, wanted = source_digest(source), inputs.source_digest
        if wanted is not None and found != wanted:
            raise PlanError(
                f"--load {args.load}: is model {found[:16]}, the inputs are about model "
                f"{wanted[:16]} (source_digest); give the model they were made from"
            )
        return source.config


def run(args: argparse.Namespace) -> None:
    _check_outputs(args)
    inputs = read_inputs(args.inputs)
    sections = with_unique_names(report_sections(inputs, _model(args, inputs)))
    names = ", ".join(file.label for file in inputs.files)
    page = page_html("Pruning report", names, sections).encode()
    if args.png_dir is not None:
        files = write_beside(args.png_dir, sections, overwrite=args.overwrite)
        options.show(f"wrote {len(files)} files into {args.png_dir}")
    replace_file(args.save, page)
    options.show(f"wrote {args.save}: {len(page) / 1e6:.2f} MB")
