"""Every check of a training run's options that needs no file and no process."""

from __future__ import annotations

import math

from megatron_prune.data.domains import WEIGHTINGS
from megatron_prune.engine.groups import data_parallel_size
from megatron_prune.engine.objectives.distill_options import check_distill
from megatron_prune.engine.train.options import (
    LR_DECAY_STYLES,
    WSD_DECAY_STYLES,
    TrainOptions,
    warmup_iters,
)
from megatron_prune.errors import ConfigError, ShapeError
from megatron_prune.flags import flag_name, given
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lora import Lora, check_lora


def check_options(options: TrainOptions, grid: ParallelGrid, processes: int) -> None:
    """Refuse options that cannot work together, before any file is opened.

    Raises:
        ConfigError: with the flag, its value and what was wanted.
        ShapeError: the processes do not fit the layout.
    """
    _at_least(options, 1, "train_iters", "micro_batch_size", "global_batch_size", "log_interval")
    _at_least(options, 1, "eval_interval", "save_interval", "keep_last", "exit_interval")
    _at_least(options, 1, "recompute_num_layers", "loss_scale_window", "hysteresis")
    _at_least(options, 1, "lr_decay_iters", "lr_wsd_decay_iters")
    _at_least(options, 0, "eval_iters", "lr_warmup_iters", "lr", "min_lr", "lr_warmup_init")
    _at_least(options, 0, "weight_decay", "clip_grad", "seed", "skip_nonfinite")
    _at_least(options, 1, "loss_spike_factor", "loss_spike_window")
    if options.loss_spike_factor is not None and not options.skip_nonfinite:
        raise ConfigError(
            "--loss-spike-factor needs --skip-nonfinite K: how many steps in a row may be skipped"
        )
    if options.load is None:
        raise ConfigError("--load is missing: the model to train, or with --init-random its shape")
    _check_data_flags(options)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(options, name) < 1:
            value = getattr(options, name)
            raise ConfigError(f"{flag_name(name)} is {value}; wanted 0 <= beta < 1")
    if not options.adam_eps > 0:
        raise ConfigError(f"--adam-eps is {options.adam_eps}; wanted more than 0")
    _check_context(options, grid)
    _check_batches(options, data_parallel_size(grid, processes, options.context_parallel_size))
    _check_learning_rate(options)
    _check_recompute(options)
    if options.distill is not None:
        check_distill(options.distill, grid, options.recompute_granularity)
    if options.keep_zeros and options.init_random:
        raise ConfigError(
            "--keep-zeros and --init-random: weights that are drawn have no zeros; give one"
        )
    if options.lora is not None:
        _check_lora(options, options.lora)


def _at_least(options: TrainOptions, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value >= least):
            raise ConfigError(f"{flag_name(name)} is {value}; wanted {least:g} or more")


def _check_lora(options: TrainOptions, lora: Lora) -> None:
    check_lora(lora)
    if options.keep_zeros:
        raise ConfigError(
            "--keep-zeros and --lora-rank: the weights are fixed, and factors would fill their "
            "zeros; give --lora-keep-zeros instead"
        )
    if options.init_random:
        raise ConfigError(
            "--lora-rank and --init-random: factors adapt weights that have been trained; give one"
        )
    if options.transformer_impl == "transformer_engine":
        raise ConfigError(
            "--lora-rank and --transformer-impl transformer_engine: its linears have no factors; "
            "use local, which auto takes with --lora-rank"
        )


def _check_data_flags(options: TrainOptions) -> None:
    if options.domains is None:
        if not options.data_path:
            raise ConfigError(
                "--data-path is missing: prefixes that preprocess wrote; or a recipe of --domains"
            )
        for name in given(options):
            if name.startswith("domain_"):
                raise ConfigError(f"{flag_name(name)} goes with --domains, which is missing")
        return
    if options.data_path:
        raise ConfigError("--data-path and --domains: give one; the recipe lists the corpora")
    if options.domain_weighting not in WEIGHTINGS:
        raise ConfigError(
            f"--domain-weighting {options.domain_weighting!r}; wanted {' or '.join(WEIGHTINGS)}"
        )
    _at_least(options, 1, "domain_update_interval")
    _at_least(options, 0, "domain_eta", "domain_smoothing")
    if options.domain_smoothing > 1:
        raise ConfigError(
            f"--domain-smoothing is {options.domain_smoothing}; wanted a share, 0 to 1"
        )
    if options.domain_weighting == "dynamic" and not options.eval_iters:
        raise ConfigError(
            "--eval-iters 0: the weights of domains follow their validation losses; give 1 or "
            "more, or --domain-weighting constant"
        )


def _check_context(options: TrainOptions, grid: ParallelGrid) -> None:
    """Each rank of a context-parallel group has two chunks; --sequence-parallel cuts them on."""
    contexts, seq = options.context_parallel_size, options.seq_length
    if contexts == 1:
        return
    parts = 2 * contexts
    if options.sequence_parallel:
        parts = math.lcm(parts, contexts * grid.tensor_parallel)
    if seq % parts:
        raise ShapeError(
            f"--context-parallel-size {contexts}: --seq-length {seq} is not a multiple of {parts}; "
            f"use {max(seq // parts, 1) * parts}"
        )


def _check_batches(options: TrainOptions, data_parallel: int) -> None:
    micro = options.micro_batch_size * data_parallel
    total = options.batch_size(data_parallel)
    if total % micro:
        raise ConfigError(
            f"--global-batch-size {total} is not a multiple of --micro-batch-size "
            f"{options.micro_batch_size} x {data_parallel} data-parallel ranks = {micro}"
        )
    if options.rampup_batch_size is None:
        return
    start, increment, samples = options.rampup_batch_size
    if start < 1 or increment < 1 or samples < 0 or start > total or (total - start) % increment:
        raise ConfigError(
            f"--rampup-batch-size {start} {increment} {samples}: wanted a start of 1 or more that "
            f"reaches --global-batch-size {total} in whole steps of the increment"
        )
    if start % micro or increment % micro:
        raise ConfigError(
            f"--rampup-batch-size {start} {increment} {samples}: start and increment must be "
            f"multiples of --micro-batch-size x data-parallel ranks = {micro}"
        )


def _check_learning_rate(options: TrainOptions) -> None:
    if options.lr_decay_style not in LR_DECAY_STYLES:
        raise ConfigError(
            f"--lr-decay-style {options.lr_decay_style!r}; wanted one of "
            f"{', '.join(LR_DECAY_STYLES)}"
        )
    if not options.min_lr <= options.lr or not options.lr_warmup_init <= options.lr:
        raise ConfigError(
            f"--lr {options.lr} is below --min-lr {options.min_lr} or --lr-warmup-init "
            f"{options.lr_warmup_init}"
        )
    if options.lr_warmup_fraction is not None:
        if options.lr_warmup_iters:
            raise ConfigError("--lr-warmup-iters and --lr-warmup-fraction: give one of them")
        if not 0 <= options.lr_warmup_fraction < 1:
            raise ConfigError(f"--lr-warmup-fraction {options.lr_warmup_fraction}; wanted 0 to 1")
    decay = options.lr_decay_iters or options.train_iters
    if warmup_iters(options) >= decay:
        raise ConfigError(
            f"--lr-warmup-iters {warmup_iters(options)} is not below the {decay} steps over which "
            "the learning rate decays (--lr-decay-iters, default --train-iters)"
        )
    if options.lr_decay_style == "WSD":
        if options.lr_wsd_decay_style not in WSD_DECAY_STYLES:
            raise ConfigError(
                f"--lr-wsd-decay-style {options.lr_wsd_decay_style!r}; wanted one of "
                f"{', '.join(WSD_DECAY_STYLES)}"
            )
        if options.lr_wsd_decay_iters is None or options.lr_wsd_decay_iters > decay:
            raise ConfigError(
                f"--lr-decay-style WSD needs --lr-wsd-decay-iters, at most {decay}; found "
                f"{options.lr_wsd_decay_iters}"
            )
    if options.override_opt_param_scheduler and options.use_checkpoint_opt_param_scheduler:
        raise ConfigError(
            "--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler: give one"
        )


def _check_recompute(options: TrainOptions) -> None:
    granularity, method = options.recompute_granularity, options.recompute_method
    if granularity not in (None, "full", "selective"):
        raise ConfigError(f"--recompute-granularity {granularity!r}; wanted full or selective")
    if granularity == "full":
        if method not in ("uniform", "block") or options.recompute_num_layers is None:
            raise ConfigError(
                "--recompute-granularity full needs --recompute-method uniform or block, and "
                "--recompute-num-layers N"
            )
    elif method is not None or options.recompute_num_layers is not None:
        raise ConfigError(
            "--recompute-method and --recompute-num-layers go with --recompute-granularity full"
        )
