"""Train a checkpoint on: recovery after pruning, or a baseline from random weights.

Takes a checkpoint of any format and layout, and Megatron's flags. When --save already holds a run,
that run continues, at any TP, PP and number of processes; the same command can be started again
and again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_prune.cli.distill_flags import add_distill, distill_from
from megatron_prune.cli.domain_flags import add_domains
from megatron_prune.cli.engine_flags import add_engine, dtype_of, process_groups
from megatron_prune.cli.lora_flags import add_lora, lora_from
from megatron_prune.cli.options import grid_from, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _add_start(parser)
    add_domains(parser)
    _add_batches(parser)
    _add_learning_rate(parser)
    _add_optimizer(parser)
    _add_intervals(parser)
    add_distill(parser)
    add_lora(parser)
    add_engine(parser)


def _add_start(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", type=Path, metavar="CKPT", help="where the weights come from")
    parser.add_argument(
        "--save", type=Path, required=True, metavar="DIR", help="checkpoints and metrics.jsonl"
    )
    parser.add_argument(
        "--init-random", action="store_true", help="the shape of --load, weights from --seed"
    )
    parser.add_argument(
        "--finetune", action="store_true", help="from --load take the weights only, start at 0"
    )
    parser.add_argument(
        "--no-load-optim", action="store_true", help="continue without the optimizer's state"
    )
    parser.add_argument(
        "--seed", type=int, default=1234, metavar="N", help="of weights and samples (default 1234)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything, say what would happen, stop"
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-path",
        nargs="+",
        default=[],
        metavar="[WEIGHT] PREFIX",
        help="corpora of preprocess, without .bin; with weights to blend them",
    )
    group.add_argument(
        "--split", default="969,30,1", help="training, validation, test (default 969,30,1)"
    )
    group.add_argument(
        "--data-cache-path", type=Path, metavar="DIR", help="sample indices; default SAVE/.cache"
    )
    group.add_argument(
        "--tokenizer-model", type=Path, metavar="PATH", help="default: the checkpoint's own"
    )
    group.add_argument("--eod-mask-loss", action="store_true", help="do not learn to predict EOD")


def _add_batches(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batches")
    group.add_argument(
        "--train-iters", type=positive, required=True, metavar="N", help="steps of the whole run"
    )
    group.add_argument(
        "--micro-batch-size",
        type=positive,
        required=True,
        metavar="N",
        help="sequences of one forward pass on one data-parallel rank",
    )
    group.add_argument(
        "--global-batch-size",
        type=positive,
        metavar="N",
        help="default: micro batch x data parallel",
    )
    group.add_argument(
        "--rampup-batch-size",
        type=int,
        nargs=3,
        metavar=("START", "INCREMENT", "SAMPLES"),
        help="grow the global batch from START by INCREMENT over SAMPLES",
    )
    group.add_argument(
        "--seq-length", type=positive, required=True, metavar="N", help="tokens of a sequence"
    )
    group.add_argument(
        "--context-parallel-size",
        type=positive,
        default=1,
        metavar="N",
        help="ranks that share a sequence (default 1)",
    )
    group.add_argument("--recompute-granularity", metavar="WHAT", help="full or selective")
    group.add_argument("--recompute-method", metavar="HOW", help="uniform or block")
    group.add_argument(
        "--recompute-num-layers", type=positive, metavar="N", help="of a stage, for that method"
    )


def _add_learning_rate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("learning rate")
    group.add_argument("--lr", type=float, required=True, help="peak learning rate")
    group.add_argument("--min-lr", type=float, default=0.0, help="where the decay ends (default 0)")
    group.add_argument(
        "--lr-decay-style",
        default="linear",
        metavar="STYLE",
        help="constant, linear (default), cosine, inverse-square-root or WSD",
    )
    group.add_argument("--lr-decay-iters", type=positive, metavar="N", help="default --train-iters")
    group.add_argument(
        "--lr-warmup-iters", type=int, default=0, metavar="N", help="steps up to --lr (default 0)"
    )
    group.add_argument(
        "--lr-warmup-fraction", type=float, metavar="SHARE", help="of --lr-decay-iters, instead"
    )
    group.add_argument(
        "--lr-warmup-init", type=float, default=0.0, help="where the warm-up begins (default 0)"
    )
    group.add_argument(
        "--lr-wsd-decay-style",
        default="exponential",
        metavar="STYLE",
        help="of WSD's last part: exponential (default), linear, cosine or minus_sqrt",
    )
    group.add_argument(
        "--lr-wsd-decay-iters", type=positive, metavar="N", help="length of WSD's last part"
    )
    group.add_argument(
        "--override-opt-param-scheduler", action="store_true", help="flags win over the checkpoint"
    )
    group.add_argument(
        "--use-checkpoint-opt-param-scheduler",
        action="store_true",
        help="the checkpoint wins over the flags",
    )


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer")
    group.add_argument(
        "--weight-decay", type=float, default=0.01, help="of matrices (default 0.01)"
    )
    group.add_argument(
        "--clip-grad", type=float, default=1.0, help="largest gradient norm (default 1), 0: any"
    )
    group.add_argument("--adam-beta1", type=float, default=0.9, help="default 0.9")
    group.add_argument("--adam-beta2", type=float, default=0.999, help="default 0.999")
    group.add_argument("--adam-eps", type=float, default=1e-8, help="default 1e-8")
    group.add_argument("--loss-scale", type=float, help="fp16: fixed instead of dynamic")
    group.add_argument(
        "--initial-loss-scale", type=float, default=2.0**32, help="fp16 (default 2**32)"
    )
    group.add_argument("--min-loss-scale", type=float, default=1.0, help="fp16 (default 1)")
    group.add_argument(
        "--loss-scale-window",
        type=positive,
        default=1000,
        metavar="N",
        help="fp16: good steps until the scale doubles (default 1000)",
    )
    group.add_argument(
        "--hysteresis",
        type=positive,
        default=2,
        metavar="N",
        help="fp16: bad steps until the scale halves (default 2)",
    )
    group.add_argument(
        "--skip-nonfinite",
        type=int,
        default=0,
        metavar="K",
        help="skip a step whose loss or gradient is no number, stop after more than K in a row "
        "(default 0: stop at the first)",
    )
    group.add_argument(
        "--loss-spike-factor",
        type=float,
        metavar="X",
        help="skip as well a step with more than X times the median loss (default: none)",
    )
    group.add_argument(
        "--loss-spike-window",
        type=positive,
        default=100,
        metavar="N",
        help="steps the median is of (default 100)",
    )
    group.add_argument(
        "--use-distributed-optimizer",
        action="store_true",
        help="split the optimizer's state over data-parallel ranks",
    )


def _add_intervals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("telling and saving")
    group.add_argument(
        "--log-interval", type=positive, default=100, metavar="N", help="steps (default 100)"
    )
    group.add_argument(
        "--eval-interval", type=positive, default=1000, metavar="N", help="steps (default 1000)"
    )
    group.add_argument(
        "--eval-iters",
        type=int,
        default=100,
        metavar="N",
        help="batches of a validation (default 100), 0: none",
    )
    group.add_argument(
        "--save-interval", type=positive, metavar="N", help="default: at the end only"
    )
    group.add_argument(
        "--async-save",
        action="store_true",
        help="write checkpoints from a copy in host memory while training goes on",
    )
    group.add_argument("--keep-last", type=positive, metavar="N", help="checkpoints; default: all")
    group.add_argument("--exit-interval", type=positive, metavar="N", help="save, and exit with 0")
    group.add_argument(
        "--tensorboard-dir", type=Path, metavar="DIR", help="default SAVE/tensorboard"
    )


def run(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from megatron_prune.engine.groups import world_size
    from megatron_prune.engine.train.options import TrainOptions, check_options

    given = vars(args) | {
        "dtype": dtype_of(args),
        "data_path": tuple(args.data_path),
        "distill": distill_from(args),
        "lora": lora_from(args),
        "rampup_batch_size": None if not args.rampup_batch_size else tuple(args.rampup_batch_size),
    }
    options = TrainOptions(**{field.name: given[field.name] for field in fields(TrainOptions)})
    grid = grid_from(args)
    processes = world_size()
    if args.dry_run and processes == 1:
        # one copy of the model, whatever was started
        processes = grid.world_size * options.context_parallel_size
    check_options(options, grid, processes)
    if args.dry_run:
        from megatron_prune.engine.train.dry_run import describe

        print(describe(options, grid, processes))
        return
    from megatron_prune.engine.train.loop import train

    contexts = options.context_parallel_size
    with process_groups(args, grid, context_parallel=contexts, seed=options.seed) as groups:
        train(options, groups, args.argv)
