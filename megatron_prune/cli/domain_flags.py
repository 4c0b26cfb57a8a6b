"""Flags of `train` for domains that balance themselves."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune.cli.options import positive


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
