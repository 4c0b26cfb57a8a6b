"""megatron.core's DDP, optimizer and learning-rate schedule for one model.

What 0.16 lacks without Apex and Transformer Engine is mended here: torch's AdamW is switched to its
fused kernel, and the distributed optimizer can load what it saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor
from torch.nn import Parameter

from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.train.frozen import NoOptimizer
from megatron_prune.engine.train.options import TrainOptions, warmup_iters
from megatron_prune.errors import ConfigError
from megatron_prune.model.tensors import torch_dtype


def wrap_model(model: LanguageModel, options: TrainOptions) -> DistributedDataParallel:
    """The model with contiguous gradient buffers, reduced over data-parallel ranks in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=options.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # the loop checks loss and norm on every step
    )
    return DistributedDataParallel(model.config, ddp_config, model)


def build_optimizer(
    ddp: DistributedDataParallel, options: TrainOptions, *, freezes: bool = False
) -> Any:
    """AdamW on the wrapped model: fp32, mixed precision, or distributed over its copies.

    Args:
        freezes: no weight is learned, on any rank.
    """
    optimizer = NoOptimizer(options) if freezes else _adamw(ddp, options)
    config_of_model = ddp.config
    config_of_model.grad_scale_func = optimizer.scale_loss
    config_of_model.finalize_model_grads_func = finalize_model_grads
    config_of_model.no_sync_func = ddp.no_sync
    return optimizer


def _adamw(ddp: DistributedDataParallel, options: TrainOptions) -> Any:
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=options.dtype == "bf16",
        fp16=options.dtype == "fp16",
        params_dtype=torch_dtype(options.dtype),
        use_distributed_optimizer=options.use_distributed_optimizer,
        loss_scale=options.loss_scale,
        initial_loss_scale=options.initial_loss_scale,
        min_loss_scale=options.min_loss_scale,
        loss_scale_window=options.loss_scale_window,
        hysteresis=options.hysteresis,
    )
    optimizer = get_megatron_optimizer(config=config, model_chunks=[ddp])
    for inner in _torch_optimizers(optimizer):
        for group in inner.param_groups:
            group["fused"], group["foreach"] = True, False
    return optimizer


def _parts(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _torch_optimizers(optimizer: Any) -> list[torch.optim.AdamW]:
    inner = [part.optimizer for part in _parts(optimizer)]
    return [one for one in inner if isinstance(one, torch.optim.AdamW)]


def main_weights(
    optimizer: Any, weights: Sequence[Parameter]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """What is stepped in the place of a model's weights, and the optimizer's state of each.

    The float32 copy of a weight of 16 bits, else the weight itself; of the distributed optimizer
    this rank's part, flat, and nothing where it has none.
    """
    for part in _parts(optimizer):
        if part.is_stub_optimizer:
            continue
        if isinstance(part, DistributedOptimizer):
            groups, places = part.optimizer.param_groups, part.model_param_group_index_map
            found = (places[weight] for weight in weights if weight in places)
            mine = [groups[group]["params"][order] for group, order in found]
        else:
            stepped = {id(main) for main in part.get_parameters()}
            every = (getattr(weight, "main_param", weight) for weight in weights)
            mine = [main for main in every if id(main) in stepped]
        yield from ((main, part.optimizer.state.get(main, {})) for main in mine)


def build_scheduler(
    optimizer: Any, options: TrainOptions, data_parallel: int
) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in samples."""

    def samples(iterations: int) -> int:
        return options.samples_after(iterations, data_parallel)

    decay, wsd = options.lr_decay_iters or options.train_iters, options.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=options.lr_warmup_init,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=samples(warmup_iters(options)),
        lr_decay_steps=samples(decay),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=samples(options.train_iters),
        wd_incr_style="constant",
        wsd_decay_steps=None if wsd is None else samples(decay) - samples(decay - wsd),
        lr_wsd_decay_style=options.lr_wsd_decay_style,
        use_checkpoint_opt_param_scheduler=not options.override_opt_param_scheduler,
        override_opt_param_scheduler=options.override_opt_param_scheduler,
    )


def load_scheduler(
    scheduler: OptimizerParamScheduler, saved: dict[str, Any], options: TrainOptions
) -> None:
    """Continue a saved schedule.

    Raises:
        ConfigError: the flags ask for another schedule than the saved one, and not which one wins.
    """
    now = scheduler.state_dict()
    other = [
        key for key in now if key not in ("num_steps", "wd_incr_steps") and now[key] != saved[key]
    ]
    chosen = options.override_opt_param_scheduler or options.use_checkpoint_opt_param_scheduler
    if other and not chosen:
        listed = ", ".join(f"{key} {saved[key]} -> {now[key]}" for key in other)
        raise ConfigError(
            f"the flags ask for another schedule than the checkpoint's (in samples: {listed}); "
            "give the same flags, or --override-opt_param-scheduler to take the flags', or "
            "--use-checkpoint-opt_param-scheduler to keep the checkpoint's"
        )
    scheduler.load_state_dict(saved)


def prepare_to_load(optimizer: Any) -> None:
    """Give the distributed optimizer the states that its loading copies into."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._init_optimizer_states_with_dummy_values()


def load_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Load a state that `Optimizer.sharded_state_dict` described.

    Three faults of megatron-core 0.16.1 with torch's AdamW are gone round: the states must exist
    before (`prepare_to_load`), ``step`` is not among the loaded tensors, and one tensor of it is
    shared by all parameters afterwards, each of which then advances it.
    """
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        known = {"step": state["step"]} if "step" in state else {}
        original(self, model_param, {**known, **tensors})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_step
    try:
        optimizer.load_state_dict(saved)
    finally:
        DistributedOptimizer._set_main_param_and_optimizer_states = original
    for inner in _torch_optimizers(optimizer):
        for state in inner.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()


@torch.no_grad()
def step_optimizer(
    optimizer: Any,
    over_ranks: Callable[[float], float],
    when_ready: Callable[[], float] = lambda: 0.0,
) -> float | None:
    """`ChainedOptimizer.step`, with a look at the norm before anything is changed.

    Args:
        over_ranks: sums a number over all ranks, so that all see the one that is not finite.
        when_ready: called once the gradients are whole and in float32, before their norm is taken;
            the norm of others that are clipped together with them.

    Returns:
        The norm of all; not finite: nothing was changed; None: fp16's loss scale was too large.
    """
    overflows = optimizer.prepare_grads()
    beside = 0.0 if overflows else when_ready()
    norm = 0.0 if overflows else math.hypot(optimizer.get_grad_norm(), beside)
    total = over_ranks(norm)
    if overflows or not math.isfinite(total):
        return None if overflows else total
    for part in _parts(optimizer):
        parameters = [] if part.is_stub_optimizer else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=norm
            )
    return norm if optimizer.step_with_ready_grads() else None


def learning_rate(optimizer: Any) -> float:
    """The rate the next step is taken with."""
    return float(optimizer.param_groups[0]["lr"])
