"""Score the units of a model: what a plan decides by.

  megatron-prune score --load llama --data calibration.jsonl --criterion activation,wanda \\
      --save scores.safetensors
  torchrun --nproc-per-node 8 -m megatron_prune score --load llama --data calibration.jsonl \\
      --tensor-model-parallel-size 8 --criterion wanda,perplexity --save scores.safetensors

Scores are the same at any TP, PP and DP within rounding. One file serves many plans; started again
with more criteria, the same model and the same data, it is added to.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.cli.engine_flags import add_engine, process_groups
from megatron_prune.cli.options import agree_on_arguments, check_output_file, grid_from, opened
from megatron_prune.cli.score_flags import (
    add_score_arguments,
    check_data,
    score_options,
    score_windows,
)
from megatron_prune.criteria import SCORED
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.planning.scores import Scores, criteria_in, load_scores, scores_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.engine.observe.score import ScoreOptions
    from megatron_prune.sources.source import Source


_REMOVING = tuple(name for name, needs in SCORED.items() if needs.removal)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--load", type=Path, required=True, metavar="CKPT_OR_HF", help="checkpoint of any format"
    )
    parser.add_argument(
        "--save", type=Path, required=True, metavar="SCORES", help="a .safetensors file"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace scores of another model or other data"
    )
    parser.add_argument(
        "--criterion",
        required=True,
        metavar="NAME[,NAME...]",
        help=f"any of {', '.join(SCORED)}; or all that an expression names, as plan takes it",
    )
    add_score_arguments(parser)
    add_engine(parser)


def _criteria(text: str) -> tuple[str, ...]:
    found = criteria_in(text)
    unknown = [name for name in found if name not in SCORED]
    if unknown or not found:
        raise ConfigError(
            f"--criterion {text}: {', '.join(unknown) or 'nothing'} is no criterion to score; "
            f"wanted some of {', '.join(SCORED)}"
        )
    return found


def run(args: argparse.Namespace) -> None:
    from megatron_prune.engine.forward.model import check_model
    from megatron_prune.engine.groups import data_parallel_size, world_size

    grid, criteria = grid_from(args), _criteria(args.criterion)
    data_parallel_size(grid, world_size())
    check_data(args, criteria)
    inputs = (args.load, args.data, args.tokenizer_model)
    check_output_file(args.save, overwrite=True, inputs=inputs)  # scores are added to
    with opened(args.load, args.family) as source:
        source.config.shape.check_uniform("score", "score its source")
        options = score_options(args, criteria, source.config)
        grid.check(source.config.shape)
        check_model(source.config, options.model, grid.tensor_parallel)
        options.removed_layers(source.config.shape.num_layers)
        with process_groups(args, grid) as groups:
            agree_on_arguments(groups.ranks, args)
            _score(args, source, options, groups)


def _score(args: argparse.Namespace, source: Source, options: ScoreOptions, groups: object) -> None:
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.groups import Groups
    from megatron_prune.engine.observe.score import score
    from megatron_prune.files import replace_file

    assert isinstance(groups, Groups)
    windows, known = on_first_rank(groups.ranks, lambda: _prepare(args, source, options))

    def save(scores: Scores) -> None:
        replace_file(args.save, scores_bytes(scores))

    scores = score(source, options, groups, windows, known=known, save=save)
    if groups.ranks.is_first:
        _tell(args, scores)


def _prepare(
    args: argparse.Namespace, source: Source, options: ScoreOptions
) -> tuple[Tensor | None, Scores | None]:
    """The calibration windows, and what an earlier run found: of this model and these windows."""

    windows = score_windows(args, source, options.model.seq_length)
    if not args.save.exists():
        return windows, None
    try:
        known = load_scores(args.save)
    except DamagedError as error:  # whatever it is, it may be all there is of it
        raise DamagedError(f"--save {error}; remove it, or choose another file") from None
    other = _difference(known, source.digest, windows, options)
    if other is None:
        return windows, known
    if args.overwrite:
        return windows, None
    raise ConfigError(
        f"--save {args.save}: holds scores of {other}; choose another file or use --overwrite"
    )


def _difference(
    known: Scores, digest: str, windows: Tensor | None, options: ScoreOptions
) -> str | None:
    """What scores in the file are of and this run's are not; None when they go together."""
    from megatron_prune.engine.observe.score import data_digest

    if known.source_digest != digest:
        return "another model"
    facts = known.provenance
    if windows is None or not facts.get("tokens"):
        return None  # magnitude alone goes with any data
    if facts.get("data_digest") != data_digest(windows):
        return "other data"
    if facts.get("dtype") != options.model.dtype:
        return f"a model run in {facts.get('dtype')}, this run is {options.model.dtype}"
    wanted = options.removal_facts(len(windows), known.shape.num_layers)
    for fact, value in wanted.items():
        uses = ("perplexity-greedy",) if fact == "removal_layers" else _REMOVING
        if facts.get(fact) != value and any(name in known.criteria for name in uses):
            flag = fact.replace("_", "-")
            return f"--{flag} {facts.get(fact, 'unrecorded')}, this run's is {value}"
    return None


def _tell(args: argparse.Namespace, scores: Scores) -> None:
    for name, axes in scores.criteria.items():
        print(f"{name:<18} axes {' '.join(axes)}")
    tokens = scores.provenance.get("tokens", 0)
    print(f"{args.save}: {tokens} calibration tokens", file=sys.stderr)
