"""What a run that learns masks is asked to do, and every check of it that needs no file."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from megatron_prune.engine.train.options import BATCHES, LR, TrainOptions
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.flags import Group, flag, flag_name, given, positive
from megatron_prune.model.axes import count_parameters, layer_weights, outer_weights
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.planning.choose import Targets, check_targets
from megatron_prune.planning.plan import PRUNE_TYPES
from megatron_prune.shearing.constraint import Constraint, Size, Warmup
from megatron_prune.shearing.method import MASK_METHODS, MaskRates, mask_method
from megatron_prune.shearing.units import MASK_UNITS, gated_axes

_TARGET = Group("the target")
_MASKS = Group("masks")
CLIPS = ("joint", "separate")


def _remain(name: str) -> Any:
    return flag(f"{name} to keep", default=None, metavar="N", group=_TARGET)


@dataclass(frozen=True, kw_only=True)
class ShearOptions(TrainOptions):
    """One run of ``shear``: the target, how masks are learned, and all that ``train`` takes.

    What a run needs is not required of a command that only writes what a run has left, so it is
    looked for by `check_masks`.
    """

    learns_masks: ClassVar[bool] = True
    train_iters: int = flag("steps of the whole run", default=0, group=BATCHES, metavar="N")
    micro_batch_size: int = flag(
        "sequences of one forward pass on one data-parallel rank",
        default=0,
        group=BATCHES,
        metavar="N",
    )
    seq_length: int = flag("tokens of a sequence", default=0, group=BATCHES, metavar="N")
    lr: float = flag("peak learning rate of the weights", default=1e-4, group=LR)
    save_pruned: Path | None = flag(
        "the pruned model, gates folded in, as a Hugging Face directory; alone with --save: of a "
        "run that has ended or was stopped",
        default=None,
        metavar="DIR",
        group=_TARGET,
    )

    hidden_size_remain: int | None = _remain("hidden_size")
    ffn_hidden_size_remain: int | None = _remain("ffn_hidden_size")
    num_attention_heads_remain: int | None = _remain("num_attention_heads")
    num_query_groups_remain: int | None = _remain("num_query_groups")
    num_layers_remain: int | None = _remain("num_layers")
    target_params: int | None = flag(
        "parameters to keep, embeddings too, instead of sizes: the shape is learned as well, and "
        "rounded at the end",
        default=None,
        metavar="P",
        group=_TARGET,
        parse=positive,
    )
    prune_type: str = flag(
        "balance: as many on each of --balance-for ranks",
        default="balance",
        choices=PRUNE_TYPES,
        group=_TARGET,
    )
    balance_for: int | None = flag(
        "TP size to balance for (default: the source's)",
        default=None,
        metavar="N",
        group=_TARGET,
        parse=positive,
    )
    mask_method: str = flag(
        "how gates are learned: with noise, without, or as masks of exactly the target",
        default="hard-concrete",
        choices=tuple(MASK_METHODS),
        group=_MASKS,
    )
    mask_units: str | None = flag(
        "gates of attention: heads within their groups, whole groups, or both (default: what the "
        "target needs; groups with --target-params)",
        default=None,
        choices=MASK_UNITS,
        group=_MASKS,
    )
    mask_init: Path | None = flag(
        "scores to begin with: gates start in their order (default: all alike)",
        default=None,
        metavar="SCORES",
        group=_MASKS,
    )
    mask_init_criterion: str | None = flag(
        "which of those scores, as `plan --criterion`", default=None, metavar="NAME", group=_MASKS
    )
    mask_lr: float | None = flag(
        "learning rate of the masks (default: by method)", default=None, group=_MASKS
    )
    lagrangian_lr: float | None = flag(
        "of the linear multiplier, which rises; those of the others keep the method's ratio to it "
        "(default: by method)",
        default=None,
        group=_MASKS,
    )
    lagrangian_cap: float | None = flag(
        "how large the linear multiplier may become; 2 keeps hard-concrete from shutting too much "
        "on the way (default: no end, the official form)",
        default=None,
        metavar="X",
        group=_MASKS,
    )
    mask_warmup_iters: int = flag(
        "steps until both rates are whole; they follow the schedule of --lr besides",
        default=0,
        metavar="N",
        group=_MASKS,
    )
    sparsity_warmup_iters: int = flag(
        "steps until the targets are whole", default=0, metavar="N", group=_MASKS
    )
    start_sparsity: float = flag("where the targets begin", default=0.0, metavar="S", group=_MASKS)
    clip_masks: str = flag(
        "--clip-grad: masks and multipliers together with the weights, or apart",
        default="joint",
        choices=CLIPS,
        group=_MASKS,
    )
    freeze_weights: bool = flag(
        "learn masks alone: the weights stay, without gradients or optimizer state",
        default=False,
        group=_MASKS,
    )
    distill_self: float | None = flag(
        "with --freeze-weights: add W x KL(the model without gates || with gates); 2 goes with "
        "--mask-method deterministic",
        default=None,
        metavar="W",
        group=_MASKS,
    )

    @property
    def targets(self) -> Targets:
        return Targets(
            hidden_size=self.hidden_size_remain,
            ffn_hidden_size=self.ffn_hidden_size_remain,
            num_attention_heads=self.num_attention_heads_remain,
            num_query_groups=self.num_query_groups_remain,
            num_layers=self.num_layers_remain,
        )

    @property
    def writes_only(self) -> bool:
        """Whether nothing is to be trained."""
        return self.save_pruned is not None and not self.train_iters and self.load is None

    @property
    def rates(self) -> MaskRates:
        """Learning rates; those that are not given are the method's."""
        mask, *multipliers = mask_method(self.mask_method).rates
        if self.lagrangian_lr is not None:
            multipliers = [self.lagrangian_lr * (rate / multipliers[0]) for rate in multipliers]
        return MaskRates(
            mask=self.mask_lr or mask,
            lagrangian=tuple(multipliers),
            warmup=self.mask_warmup_iters,
            cap=self.lagrangian_cap,
        )

    def check_masks(self) -> None:
        """Refuse what cannot work, before any file is opened.

        Raises:
            ConfigError: with the flag, its value and what was wanted.
        """
        train_iters = self.train_iters
        for name in ("train_iters", "micro_batch_size", "seq_length"):
            if not getattr(self, name):
                raise ConfigError(f"{flag_name(name)} is missing")
        if self.transformer_impl == "transformer_engine":
            raise ConfigError(
                "--transformer-impl transformer_engine: it fuses norms with the linears behind "
                "them, where gates have no place; use local, which auto takes here. Training the "
                "pruned model can use it"
            )
        for name in ("mask_lr", "lagrangian_lr", "lagrangian_cap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{flag_name(name)} is {value}; wanted more than 0")
        for name in ("sparsity_warmup_iters", "mask_warmup_iters"):
            value = getattr(self, name)
            if not 0 <= value <= train_iters:
                raise ConfigError(
                    f"{flag_name(name)} is {value}; wanted 0 to --train-iters {train_iters}"
                )
        if not 0 <= self.start_sparsity < 1:
            raise ConfigError(f"--start-sparsity is {self.start_sparsity}; wanted 0 to 1")
        if self.target_params is not None and self.targets != Targets():
            raise ConfigError("--target-params and --...-remain: give a size or a shape, not both")
        if (self.mask_init is None) != (self.mask_init_criterion is None):
            raise ConfigError(
                "--mask-init and --mask-init-criterion: give both or none; the file's criteria are "
                "what `plan --criterion` takes"
            )
        self._check_method()
        self._check_frozen()

    def _check_method(self) -> None:
        """What a method has no place for: one whose masks are exact has nothing that rises."""
        if not mask_method(self.mask_method).is_exact:
            return
        why = {
            "target_params": "its masks are of one size in all layers, which a budget does not "
            "give; give a shape",
            "lagrangian_lr": "it has no multipliers; leave it out",
            "lagrangian_cap": "it has no multipliers; leave it out",
            "sparsity_warmup_iters": "its masks have the target's size from the first step on; "
            "leave it out",
            "start_sparsity": "its masks have the target's size from the first step on; leave it "
            "out",
        }
        for name in given(self):
            if name in why:
                raise ConfigError(
                    f"{flag_name(name)} {getattr(self, name)} with --mask-method "
                    f"{self.mask_method}: {why[name]}"
                )

    def _check_frozen(self) -> None:
        """What frozen weights exclude, and what needs them."""
        if self.freeze_weights:
            for flags, wrong, why in (
                ("--fp16", self.dtype == "fp16", "the loss scale follows the gradients of weights, "
                 "and there are none; use --bf16"),
                ("--lora-rank", self.lora is not None, "factors are learned; give one of the two"),
                ("--distill-hidden-layers", bool(self.hidden_layers), "it may learn projections; "
                 "learn from logits"),
            ):  # fmt: skip
                if wrong:
                    raise ConfigError(f"--freeze-weights and {flags}: {why}")
        if self.distill_self is None:
            return
        if not (math.isfinite(self.distill_self) and self.distill_self > 0):
            raise ConfigError(f"--distill-self is {self.distill_self}; wanted more than 0")
        if not self.freeze_weights:
            raise ConfigError(
                f"--distill-self {self.distill_self:g}: the teacher is the model without its "
                "gates, which has to stay what it is; give --freeze-weights too, or the model as "
                "--teacher"
            )
        if self.teacher:
            raise ConfigError("--distill-self and --teacher: give one of the two")

    def target_shape(self, shape: ModelShape, source_ranks: int) -> ModelShape | None:
        """What the masks are to leave; None where only its size is known.

        Args:
            source_ranks: tensor-parallel size of the source, the default balance.

        Raises:
            PlanError, ShapeError: the model, the balance or the layout does not allow it.
        """
        shape.check_uniform("shear", "prune its source anew")
        if self.target_params is not None:
            return None
        found = check_targets(shape, self.targets, self.ranks(source_ranks))
        sizes = {name: getattr(found, name) for name in found.__dataclass_fields__}
        sizes.pop("drop_layers")
        target = replace(shape, **{name: size for name, size in sizes.items() if size is not None})
        target.check_tensor_parallel(self.tensor_model_parallel_size)
        return target

    def ranks(self, source_ranks: int) -> int:
        """How many ranks keep equally many; 1: none have to."""
        if self.prune_type == "unbalance":
            return 1
        return self.balance_for or source_ranks

    def constraint(self, config: ModelConfig, target: ModelShape | None, ranks: int) -> Constraint:
        """What the masks are held to.

        Args:
            ranks: to balance for, see `ranks`.

        Raises:
            ConfigError, PlanError: nothing to prune, units that do not lead there, a size that is
                none of this model's.
        """
        shape = config.shape
        axes = gated_axes(shape, target, self.mask_units, ranks)
        warmup = Warmup(start=self.start_sparsity, steps=self.sparsity_warmup_iters)
        if self.target_params is None:
            return Constraint(axes=axes, warmup=warmup)
        whole = count_parameters(config)
        if self.target_params >= whole:
            raise PlanError(f"--target-params {self.target_params}: the model has {whole:,}")
        size = Size(
            target=1 - self.target_params / whole,
            shape=shape,
            layer=tuple(weight.axes for weight in layer_weights(config)),
            outer=tuple(weight.axes for weight in outer_weights(config)),
        )
        return Constraint(axes=axes, warmup=warmup, size=size)
