"""What a training run is asked to do; see `checks` for what cannot be asked.

The fields are the flags of ``train``, with Megatron's names and defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from megatron_prune.engine.objectives.distill_options import DistillOptions
from megatron_prune.engine.running import Engine
from megatron_prune.families import FAMILIES
from megatron_prune.flags import Group, flag, positive
from megatron_prune.model.lora import LoraOptions

LR_DECAY_STYLES = ("constant", "linear", "cosine", "inverse-square-root", "WSD")
WSD_DECAY_STYLES = ("exponential", "linear", "cosine", "minus_sqrt")

_DATA = Group("data")
_DOMAINS = Group("domains, instead of --data-path")
BATCHES = Group("batches")
LR = Group("learning rate")
_OPTIMIZER = Group("optimizer")
_TELLING = Group("telling and saving")


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Engine, LoraOptions, DistillOptions):
    """One run of ``train``.

    Attributes:
        command: what was typed, to be recorded; ranks may differ in it.
        learns_masks: whether the run is one of ``shear``.
    """

    learns_masks: ClassVar[bool] = False
    command: tuple[str, ...] = field(default=(), repr=False)
    load: Path | None = flag("where the weights come from", default=None, metavar="CKPT")
    save: Path = flag("checkpoints and metrics.jsonl", metavar="DIR")
    init_random: bool = flag("the shape of --load, weights from --seed", default=False)
    finetune: bool = flag("from --load take the weights only, start at 0", default=False)
    no_load_optim: bool = flag("continue without the optimizer's state", default=False)
    seed: int = flag("of weights and samples", default=1234, metavar="N")
    dry_run: bool = flag("check everything, say what would happen, stop", default=False)
    family: str | None = flag(
        "of a stock Megatron checkpoint whose arguments do not tell",
        default=None,
        choices=tuple(FAMILIES),
    )

    data_path: tuple[str, ...] = flag(
        "corpora of preprocess, without .bin; with weights to blend them",
        default=(),
        group=_DATA,
        metavar="[WEIGHT] PREFIX",
    )
    split: str = flag("training, validation, test", default="969,30,1", group=_DATA)
    data_cache_path: Path | None = flag(
        "sample indices (default: SAVE/.cache)", default=None, group=_DATA, metavar="DIR"
    )
    tokenizer_model: Path | None = flag(
        "to check the corpora by (default: the checkpoint's own)",
        default=None,
        group=_DATA,
        metavar="PATH",
    )
    eod_mask_loss: bool = flag("do not learn to predict EOD", default=False, group=_DATA)

    domains: Path | None = flag(
        "domains, their corpora, weights and targets", default=None, group=_DOMAINS, metavar="YAML"
    )
    domain_weighting: str = flag(
        "dynamic: towards domains above their target; or constant",
        default="dynamic",
        group=_DOMAINS,
        metavar="HOW",
    )
    domain_update_interval: int = flag(
        "steps between changes of the weights",
        default=400,
        group=_DOMAINS,
        metavar="N",
        parse=positive,
    )
    domain_eta: float = flag("how strongly losses count", default=1.0, group=_DOMAINS)
    domain_smoothing: float = flag(
        "spread evenly over all domains", default=1e-4, group=_DOMAINS, metavar="SHARE"
    )
    domain_weight_floor: float = flag(
        "no domain has less", default=0.0, group=_DOMAINS, metavar="SHARE"
    )
    domain_weight_cap: float = flag(
        "no domain has more", default=1.0, group=_DOMAINS, metavar="SHARE"
    )
    domain_clip: bool = flag(
        "do not take weight from domains below their target", default=False, group=_DOMAINS
    )

    train_iters: int = flag("steps of the whole run", group=BATCHES, metavar="N", parse=positive)
    micro_batch_size: int = flag(
        "sequences of one forward pass on one data-parallel rank",
        group=BATCHES,
        metavar="N",
        parse=positive,
    )
    global_batch_size: int | None = flag(
        "sequences of a step (default: micro batch x data parallel)",
        default=None,
        group=BATCHES,
        metavar="N",
        parse=positive,
    )
    rampup_batch_size: tuple[int, int, int] | None = flag(
        "grow the global batch from START by INCREMENT over SAMPLES",
        default=None,
        group=BATCHES,
        metavar=("START", "INCREMENT", "SAMPLES"),
    )
    seq_length: int = flag("tokens of a sequence", group=BATCHES, metavar="N", parse=positive)
    context_parallel_size: int = flag(
        "ranks that share a sequence", default=1, group=BATCHES, metavar="N", parse=positive
    )
    recompute_granularity: str | None = flag(
        "full or selective (default: nothing is computed again)",
        default=None,
        group=BATCHES,
        metavar="WHAT",
    )
    recompute_method: str | None = flag(
        "uniform or block", default=None, group=BATCHES, metavar="HOW"
    )
    recompute_num_layers: int | None = flag(
        "of a stage, for that method", default=None, group=BATCHES, metavar="N", parse=positive
    )

    lr: float = flag("peak learning rate", group=LR)
    min_lr: float = flag("where the decay ends", default=0.0, group=LR)
    lr_decay_style: str = flag(
        f"one of {', '.join(LR_DECAY_STYLES)}", default="linear", group=LR, metavar="STYLE"
    )
    lr_decay_iters: int | None = flag(
        "steps of the decay (default: --train-iters)",
        default=None,
        group=LR,
        metavar="N",
        parse=positive,
    )
    lr_warmup_iters: int = flag("steps up to --lr", default=0, group=LR, metavar="N")
    lr_warmup_fraction: float | None = flag(
        "of --lr-decay-iters, instead", default=None, group=LR, metavar="SHARE"
    )
    lr_warmup_init: float = flag("where the warm-up begins", default=0.0, group=LR)
    lr_wsd_decay_style: str = flag(
        f"of WSD's last part: one of {', '.join(WSD_DECAY_STYLES)}",
        default="exponential",
        group=LR,
        metavar="STYLE",
    )
    lr_wsd_decay_iters: int | None = flag(
        "length of WSD's last part", default=None, group=LR, metavar="N", parse=positive
    )
    override_opt_param_scheduler: bool = flag(
        "flags win over the checkpoint", default=False, group=LR
    )
    use_checkpoint_opt_param_scheduler: bool = flag(
        "the checkpoint wins over the flags", default=False, group=LR
    )

    weight_decay: float = flag("of matrices", default=0.01, group=_OPTIMIZER)
    clip_grad: float = flag("largest gradient norm; 0: any", default=1.0, group=_OPTIMIZER)
    adam_beta1: float = flag("of the mean of gradients", default=0.9, group=_OPTIMIZER)
    adam_beta2: float = flag("of the mean of their squares", default=0.999, group=_OPTIMIZER)
    adam_eps: float = flag("added to the root of that mean", default=1e-8, group=_OPTIMIZER)
    loss_scale: float | None = flag(
        "fp16: fixed instead of dynamic", default=None, group=_OPTIMIZER
    )
    initial_loss_scale: float = flag(
        "fp16: where it begins (default: 2**32)", default=2.0**32, group=_OPTIMIZER
    )
    min_loss_scale: float = flag("fp16: the least", default=1.0, group=_OPTIMIZER)
    loss_scale_window: int = flag(
        "fp16: good steps until the scale doubles",
        default=1000,
        group=_OPTIMIZER,
        metavar="N",
        parse=positive,
    )
    hysteresis: int = flag(
        "fp16: bad steps until the scale halves",
        default=2,
        group=_OPTIMIZER,
        metavar="N",
        parse=positive,
    )
    skip_nonfinite: int = flag(
        "skip a step whose loss or gradient is no number, stop after more than K in a row; 0: stop "
        "at the first",
        default=0,
        group=_OPTIMIZER,
        metavar="K",
    )
    loss_spike_factor: float | None = flag(
        "skip as well a step with more than X times the median loss (default: none)",
        default=None,
        group=_OPTIMIZER,
        metavar="X",
    )
    loss_spike_window: int = flag(
        "steps the median is of", default=100, group=_OPTIMIZER, metavar="N", parse=positive
    )
    use_distributed_optimizer: bool = flag(
        "split the optimizer's state over data-parallel ranks", default=False, group=_OPTIMIZER
    )
    keep_zeros: bool = flag(
        "weights of the layers' matrices that are zero stay zero", default=False, group=_OPTIMIZER
    )

    log_interval: int = flag(
        "steps between lines", default=100, group=_TELLING, metavar="N", parse=positive
    )
    eval_interval: int = flag(
        "steps between validations", default=1000, group=_TELLING, metavar="N", parse=positive
    )
    eval_iters: int = flag(
        "batches of a validation; 0: none", default=100, group=_TELLING, metavar="N"
    )
    save_interval: int | None = flag(
        "steps between checkpoints (default: at the end only)",
        default=None,
        group=_TELLING,
        metavar="N",
        parse=positive,
    )
    async_save: bool = flag(
        "write checkpoints from a copy in host memory while training goes on",
        default=False,
        group=_TELLING,
    )
    keep_last: int | None = flag(
        "checkpoints (default: all)", default=None, group=_TELLING, metavar="N", parse=positive
    )
    exit_interval: int | None = flag(
        "save, and exit with 0", default=None, group=_TELLING, metavar="N", parse=positive
    )
    tensorboard_dir: Path | None = flag(
        "(default: SAVE/tensorboard)", default=None, group=_TELLING, metavar="DIR"
    )

    @property
    def cache_path(self) -> Path:
        """Where the index of the samples is kept: never beside the corpora."""
        return self.data_cache_path or self.save / ".cache"

    @property
    def tensorboard_path(self) -> Path:
        return self.tensorboard_dir or self.save / "tensorboard"

    def batch_size(self, data_parallel: int) -> int:
        """Samples a step once the ramp-up is over."""
        return self.global_batch_size or self.micro_batch_size * data_parallel

    def batch_size_after(self, consumed: int, data_parallel: int) -> int:
        """Samples of the step after ``consumed`` samples, as Megatron ramps it up."""
        full = self.batch_size(data_parallel)
        if self.rampup_batch_size is None or consumed > self.rampup_batch_size[2]:
            return full
        start, increment, samples = self.rampup_batch_size
        steps = (full - start) // increment
        return min(full, start + increment * (consumed * steps // max(samples, 1)))

    def samples_after(self, iterations: int, data_parallel: int) -> int:
        """Samples that the first ``iterations`` steps take."""
        if self.rampup_batch_size is None:
            return iterations * self.batch_size(data_parallel)
        consumed = 0
        for _ in range(iterations):
            consumed += self.batch_size_after(consumed, data_parallel)
        return consumed


def warmup_iters(options: TrainOptions) -> int:
    """Steps of linear warm-up."""
    if options.lr_warmup_fraction is None:
        return options.lr_warmup_iters
    return int(options.lr_warmup_fraction * (options.lr_decay_iters or options.train_iters))
