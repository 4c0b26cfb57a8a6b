"""What a one-shot sparsity method is, and the table that methods write themselves into.

A method sees the matrices that share one input (q, k and v; o; gate and up; down), the rows of each
that were dealt to this rank, and what is known of the input. It does not know of models, layers or
process groups.

Shape suffixes: O outputs (rows of the whole matrix), R this rank's rows, I inputs.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import Tensor
from megatron_prune.model.pattern import Pattern

if TYPE_CHECKING:  # the names of methods are wanted for --help, before torch is imported
    from megatron_prune.solve.kselect import Dealt


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a matrix.

    Attributes:
        share: of zeros, 0 < share < 1; of a pattern 1 - N / M.
        pattern: None for zeros anywhere. Its group divides the matrix's inputs.
    """

    share: float
    pattern: Pattern | None = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What enters some matrices on the calibration text; the same on every rank.

    Attributes:
        windows: how many.
        squares_I: [I] float64, mean over windows of each input's sum of squares over the window's
            tokens (Wanda's ``scaler_row``). With ``--upstream-statistics`` the k-th window (from 1)
            counts ``1 / k`` of that.
        gram_II: [I, I] float32, X^T X over all tokens; None where the method does not need it.
    """

    windows: int
    squares_I: Tensor
    gram_II: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class How:
    """The options of methods.

    Attributes:
        variant: Wanda's, whose rows differ in how many weights they keep.
        weight_update: one of `WEIGHT_UPDATES`.
        block_size: inputs that share a threshold in SparseGPT and in "iter".
        damping: added to the second moments' diagonal, as a share of its mean.
        refit: whether what a method keeps is solved for again.
    """

    variant: bool = False
    weight_update: str = "none"
    block_size: int = 128
    damping: float = 0.01
    refit: bool = False


@dataclass(frozen=True, kw_only=True)
class Sparse:
    """One matrix, done.

    Attributes:
        weight_RI: float32, this rank's rows with their zeros.
        close: how many decisions of this rank's rows were within rounding of going the other way:
            weights that were kept though their key is not even `CLOSE` above the highest one
            pruned in what they were compared with (a matrix, row, block or group).
    """

    weight_RI: Tensor
    close: int


CLOSE = 1e-5
"""Relative: a hundred roundings of float32, by which long sums differ between layouts."""

Prepared = Mapping[str, Tensor]
"""What is made of `Inputs` once, on the first rank, and given to all (a Cholesky factor, an
eigendecomposition), by name."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        needs: "weights" alone, "squares" of inputs, or their "gram" (and squares).
        updates: whether kept weights change.
        prepare: on the first rank only; see `Prepared`. May raise DamagedError. Of a method that
            needs "weights" alone it is not called, and ``{}`` stands for its result. Where kept
            weights change, "dead_I" (bool) tells of inputs that never fire: their weights are 0.
        prune: this rank's rows [R, I] float32 of matrices that share an input, one answer for each.
            Weights that are zero already stay zero. The arguments are not changed.
    """

    name: str
    needs: str
    updates: bool
    prepare: Callable[[Inputs, How], Prepared]
    prune: Callable[[Sequence[Tensor], Prepared, Asked, How, Dealt], list[Sparse]]


METHODS: Mapping[str, str] = {
    "magnitude": "the smallest weights of each matrix; no text",
    "wanda": "the smallest |weight| x norm of its input, in each row (arXiv:2306.11695)",
    "sparsegpt": "optimal brain surgery, column by column (arXiv:2301.00774)",
    "admm": "ADMM with one inverse and 20 steps (arXiv:2401.02938)",
    "alps": "ADMM with a penalty schedule, then conjugate gradients (arXiv:2406.07831)",
}
"""What ``--method`` takes, and what each does, in the order of their cost."""

WEIGHT_UPDATES = ("none", "seq", "iter")
"""What ``--weight-update`` takes: kept weights stay; SparseGPT's update with the mask found first;
with a mask found by blocks, from weights already updated."""


def method_for(name: str, how: How) -> Method:
    """The method that flags ask for.

    Raises:
        ConfigError: no such method, or options of another method.
    """
    check_method(name, how)
    if how.weight_update != "none":
        from megatron_prune.sparsity.ablations import ablation

        method = ablation(name, how.weight_update)
    else:
        method = importlib.import_module(f"megatron_prune.sparsity.{name}").METHOD
    if how.refit:
        from megatron_prune.sparsity.refit import refitted

        method = refitted(method)
    return method


def check_method(name: str, how: How) -> None:
    if name not in METHODS:
        raise ConfigError(f"--method {name}: there is no such method; choose {', '.join(METHODS)}")
    if how.weight_update not in WEIGHT_UPDATES:
        raise ConfigError(
            f"--weight-update {how.weight_update}: choose {', '.join(WEIGHT_UPDATES)}"
        )
    if how.weight_update != "none" and name not in ("magnitude", "wanda"):
        raise ConfigError(
            f"--weight-update {how.weight_update} with --method {name}, which finds weights of its "
            "own; it is for magnitude and wanda, leave it out"
        )
    if how.variant and name != "wanda":
        raise ConfigError(f"--variant with --method {name}: it is a variant of wanda; leave it out")
    if how.variant and how.weight_update != "none":
        raise ConfigError(
            f"--variant with --weight-update {how.weight_update}: the update is defined for masks "
            "of wanda itself; leave out one of them"
        )
    if how.refit and name == "alps":
        raise ConfigError("--refit with --method alps, which ends with that refit; leave it out")
    if how.block_size < 1:
        raise ConfigError(f"--block-size {how.block_size}: wanted a number of inputs, 1 or more")
    if not 0 <= how.damping < math.inf:
        raise ConfigError(f"--damping {how.damping}: wanted a number, 0 or more, such as 0.01")
