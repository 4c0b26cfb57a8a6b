"""Low-rank adaptation: which linears have factors, of which shapes, and the weight they make.

Hu et al. 2021, arXiv:2106.09685: W + alpha / rank * B @ A, where W stays as it is. The factors are
those of Megatron's linears: q, k and v of ``linear_qkv`` share one A, as gate and up of
``linear_fc1`` do, where peft gives each its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_prune.errors import ConfigError
from megatron_prune.flags import Group, flag, flag_name, given, positive
from megatron_prune.model.axes import tensor_shape
from megatron_prune.model.blocks import HALVES, KNOWN
from megatron_prune.model.fusion import stored_reader
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelShape

A, B = "lora_A", "lora_B"
# linear -> the canonical weights that lie in it one below the other
PARTS = {
    linear.rpartition(".")[2]: tuple(f"{part}.weight" for part in parts)
    for half in HALVES
    for linear, parts in ((stored_reader(half), half.inputs), (half.output, (half.output,)))
}
TARGETS = tuple(PARTS)
ROW_PARALLEL = tuple(half.projection for half in HALVES)
# Hugging Face's leaf -> the linear that it is, and the linear that it is a part of
_LEAVES = {weight.name: weight.hf.split(".")[-2] for weight in KNOWN}
_OF_HUGGING_FACE = {_LEAVES[PARTS[target][0]]: target for target in ROW_PARALLEL}
_FUSED = {
    _LEAVES[part]: target
    for target, parts in PARTS.items()
    for part in parts
    if target not in ROW_PARALLEL
}
_LORA = Group(
    "low-rank adaptation (LoRA)",
    "The weights stay as they are, and W + ALPHA / R * B @ A is used; only A and B are trained.",
    is_last=True,
)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The factors of a model.

    Attributes:
        alpha: B @ A counts alpha / rank times.
        targets: Megatron's linears that have factors, in the order of `TARGETS`.
        keep_zeros: B @ A is left out where the fixed weight is zero.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    keep_zeros: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def flags(self) -> str:
        """As ``train`` takes them."""
        zeros = " --lora-keep-zeros" if self.keep_zeros else ""
        return (
            f"--lora-rank {self.rank} --lora-alpha {self.alpha:g} "
            f"--lora-targets {' '.join(self.targets)}{zeros}"
        )


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Of a stage that trains a model."""

    lora_rank: int | None = flag(
        "train factors of this rank", default=None, group=_LORA, metavar="R", parse=positive
    )
    lora_alpha: float | None = flag(
        "of the factors (default: R; they count once, as with peft's own defaults of 8 and 8)",
        default=None,
        group=_LORA,
        metavar="ALPHA",
    )
    lora_targets: tuple[str, ...] = flag(
        f"some of {', '.join(TARGETS)} (default: all)", default=(), group=_LORA, metavar="LINEAR"
    )
    lora_keep_zeros: bool = flag("weights that are zero stay zero", default=False, group=_LORA)

    @property
    def lora(self) -> Lora | None:
        """What is asked for; None without a rank.

        Raises:
            ConfigError: an option that needs ``--lora-rank``, or unknown targets.
        """
        if self.lora_rank is None:
            for name in given(self, LoraOptions):
                raise ConfigError(
                    f"{flag_name(name)} needs --lora-rank R: without it there are no factors"
                )
            return None
        return Lora(
            rank=self.lora_rank,
            alpha=float(self.lora_rank if self.lora_alpha is None else self.lora_alpha),
            targets=parse_targets(self.lora_targets or TARGETS),
            keep_zeros=self.lora_keep_zeros,
        )


def is_factor(name: str) -> bool:
    """Whether a parameter, by whatever name it has in a model or a file, is a factor."""
    return name.rpartition(".")[2] in (A, B)


def linear_shape(target: str, shape: ModelShape) -> tuple[int, int]:
    """``(out, in)`` of a whole linear."""
    parts = [tensor_shape(name, shape) for name in PARTS[target]]
    return sum(rows for rows, _ in parts), parts[0][1]


def factor_shapes(target: str, shape: ModelShape, rank: int) -> dict[str, tuple[int, int]]:
    """The whole factors of one linear: A is [rank, in], B is [out, rank]."""
    rows, columns = linear_shape(target, shape)
    return {A: (rank, columns), B: (rows, rank)}


def merged(weight_OI: Tensor, a_rI: Tensor, b_Or: Tensor, lora: Lora) -> Tensor:
    """The weight that the model computes with, added in float32 and rounded once.

    Args:
        weight_OI: the fixed weight or a part of it, any float dtype; ``a_rI`` and ``b_Or`` have the
            columns and rows of that part.

    Returns:
        [O, I] in the dtype of ``weight_OI``.
    """
    factors = b_Or.float(), a_rI.float()
    whole = torch.addmm(weight_OI.float(), *factors, alpha=lora.scale)
    if lora.keep_zeros:
        whole.masked_fill_(weight_OI == 0, 0)
    return whole.to(weight_OI.dtype)


def parse_targets(given: Sequence[str]) -> tuple[str, ...]:
    """Megatron's names of the linears that ``--lora-targets`` names.

    Raises:
        ConfigError: a name that is none, names only a part of a linear, or comes twice.
    """
    found = [_OF_HUGGING_FACE.get(name, name) for name in given]
    for name in found:
        if name in _FUSED:
            raise ConfigError(
                f"--lora-targets {name}: is a part of {_FUSED[name]}, whose parts share one A; "
                f"name {_FUSED[name]}"
            )
        if name not in PARTS:
            known = ", ".join((*TARGETS, *_OF_HUGGING_FACE))
            raise ConfigError(f"--lora-targets {name}: wanted some of {known}")
    if len(set(found)) < len(found):
        raise ConfigError(f"--lora-targets {' '.join(given)}: names a linear twice")
    return tuple(target for target in TARGETS if target in found)


def check_lora(lora: Lora) -> None:
    """Refuse factors that no model can have.

    Raises:
        ConfigError: with the flag and its value.
    """
    if lora.rank < 1:
        raise ConfigError(f"--lora-rank is {lora.rank}; wanted 1 or more")
    if not 0 < lora.alpha < math.inf:
        raise ConfigError(f"--lora-alpha is {lora.alpha:g}; wanted more than 0")
    if not lora.targets:
        raise ConfigError(f"--lora-targets is empty; wanted some of {', '.join(TARGETS)}")


def check_rank(lora: Lora, shape: ModelShape) -> None:
    """Refuse a rank that a target cannot have.

    Raises:
        ConfigError: with the target and its sizes.
    """
    for target in lora.targets:
        rows, columns = linear_shape(target, shape)
        if lora.rank > min(rows, columns):
            raise ConfigError(
                f"--lora-rank {lora.rank}: {target} is {rows} x {columns}, of rank "
                f"{min(rows, columns)} at most; give less"
            )
