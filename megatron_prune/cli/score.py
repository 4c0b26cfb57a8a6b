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

from megatron_prune.cli.engine_flags import add_engine, dtype_of
from megatron_prune.cli.options import (
    agree_on_arguments,
    check_output_file,
    grid_from,
    opened,
    positive,
)
from megatron_prune.criteria import SCORED
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.scores import Scores, load_scores, scores_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.engine.score import ScoreOptions
    from megatron_prune.source import Source


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
        help=f"any of {', '.join(SCORED)}",
    )
    group = parser.add_argument_group("calibration")
    group.add_argument("--data", type=Path, metavar="CALIB", help="text, or JSON lines with 'text'")
    group.add_argument(
        "--num-samples", type=positive, default=1024, metavar="N", help="at most (default 1024)"
    )
    group.add_argument(
        "--seq-length", type=positive, default=4096, metavar="N", help="of a sample (default 4096)"
    )
    group.add_argument(
        "--micro-batch-size", type=positive, default=1, metavar="N", help="default 1"
    )
    group.add_argument(
        "--removal-samples",
        type=positive,
        default=8,
        metavar="N",
        help="samples of perplexity: it runs them once for each layer (default 8)",
    )
    group.add_argument(
        "--removal-layers",
        type=positive,
        metavar="N",
        help="layers that perplexity-greedy removes (default: a quarter)",
    )
    group.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", help="default: the checkpoint's own"
    )
    add_engine(parser)


def _criteria(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    unknown = [name for name in found if name not in SCORED]
    if unknown or not found:
        raise ConfigError(
            f"--criterion {text}: {', '.join(unknown) or 'nothing'} is no criterion to score; "
            f"wanted some of {', '.join(SCORED)}"
        )
    return found


def run(args: argparse.Namespace) -> None:
    from megatron_prune.engine.failures import named_failures
    from megatron_prune.engine.groups import data_parallel_size, model_parallel, world_size
    from megatron_prune.engine.model import ModelOptions, check_model
    from megatron_prune.engine.score import ScoreOptions

    grid = grid_from(args)
    data_parallel_size(grid, world_size())
    options = ScoreOptions(
        criteria=_criteria(args.criterion),
        model=ModelOptions(
            seq_length=args.seq_length,
            dtype=dtype_of(args),
            transformer_impl=args.transformer_impl,
            sequence_parallel=args.sequence_parallel,
        ),
        micro_batch_size=args.micro_batch_size,
        removal_samples=args.removal_samples,
        removal_layers=args.removal_layers,
    )
    _check_paths(args, options)
    with opened(args.load, args.family) as source:
        grid.check(source.config.shape)
        check_model(source.config, options.model, grid.tensor_parallel)
        options.removed_layers(source.config.shape.num_layers)
        with (
            named_failures(),
            model_parallel(grid, timeout_minutes=args.distributed_timeout_minutes) as groups,
        ):
            agree_on_arguments(groups.ranks, args)
            _score(args, source, options, groups)


def _check_paths(args: argparse.Namespace, options: ScoreOptions) -> None:
    text = [n for n in options.criteria if n != "magnitude"]
    if text and args.data is None:
        raise ConfigError(f"--data is missing: {', '.join(text)} look at the model at work on text")
    inputs = (args.load, args.data, args.tokenizer_model)
    check_output_file(args.save, overwrite=True, inputs=inputs)  # scores are added to


def _score(args: argparse.Namespace, source: Source, options: ScoreOptions, groups: object) -> None:
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.groups import Groups
    from megatron_prune.engine.score import score
    from megatron_prune.store.commit import replace_file

    assert isinstance(groups, Groups)
    windows, known = on_first_rank(groups.ranks, lambda: _prepare(args, source))

    def save(scores: Scores) -> None:
        replace_file(args.save, scores_bytes(scores))

    scores = score(source, options, groups, windows, known=known, save=save)
    if groups.ranks.is_first:
        _tell(args, scores)


def _prepare(args: argparse.Namespace, source: Source) -> tuple[Tensor | None, Scores | None]:
    """The calibration windows, and what an earlier run found: of this model and these windows."""
    from megatron_prune.data.windows import data_digest, model_windows
    from megatron_prune.digest import source_digest

    windows = None
    if args.data is not None:
        windows, _ = model_windows(
            args.data,
            args.tokenizer_model or args.load,
            seq_length=args.seq_length,
            max_windows=args.num_samples,
            vocab_size=source.config.shape.vocab_size,
        )
    if not args.save.exists():
        return windows, None
    try:
        known = load_scores(args.save)
    except DamagedError as error:  # whatever it is, it may be all there is of it
        raise DamagedError(f"--save {error}; remove it, or choose another file") from None
    same_model = known.source_digest == source_digest(source)
    same_data = (
        windows is None
        or not known.provenance.get("tokens")  # magnitude alone goes with any data
        or known.provenance.get("data_digest") == data_digest(windows)
    )
    if same_model and same_data:
        return windows, known
    if args.overwrite:
        return windows, None
    what = "other data" if same_model else "another model"
    raise ConfigError(
        f"--save {args.save}: holds scores of {what}; choose another file or use --overwrite"
    )


def _tell(args: argparse.Namespace, scores: Scores) -> None:
    for name, axes in scores.criteria.items():
        print(f"{name:<18} axes {' '.join(axes)}")
    tokens = scores.provenance.get("tokens", 0)
    print(f"{args.save}: {tokens} calibration tokens", file=sys.stderr)
