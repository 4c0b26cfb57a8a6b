"""What a one-shot sparsity method is, and the table that methods write themselves into.

A method sees the matrices that share one input (q, k and v; o; gate and up; down), the rows of each
that were dealt to this rank, and what is known of the input. It does not know of models, layers or
process groups.

Shape suffixes: O outputs (rows of the whole matrix), R this rank's rows, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_prune.errors import ConfigError
from megatron_prune.solve.kselect import Dealt


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """N:M, N kept of every M consecutive inputs of a row."""

    keep: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises:
        ConfigError: not N:M with 0 < N < M.
        """
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise ConfigError(
                f"--pattern {text}: wanted N:M, N kept of every M consecutive inputs, 0 < N < M, "
                "such as 2:4"
            )
        return cls(keep=int(found[1]), group=int(found[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"


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
    """The options of methods."""

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
        close: how many decisions of this rank's rows were within rounding of going the other way.
    """

    weight_RI: Tensor
    close: int


Prepared = Mapping[str, Tensor]
"""What is made of `Inputs` once, on the first rank, and given to all (a Cholesky factor, an
eigendecomposition), by name."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        needs: "weights" alone, "squares" of inputs, or their "gram" (and squares).
        updates: whether kept weights change.
        prepare: on the first rank only; see `Prepared`. May raise DamagedError.
        prune: this rank's rows [R, I] float32 of matrices that share an input, one answer for each.
            Weights that are zero already stay zero. The arguments are not changed.
    """

    name: str
    needs: str
    updates: bool
    prepare: Callable[[Inputs, How], Prepared]
    prune: Callable[[Sequence[Tensor], Prepared, Asked, How, Dealt], list[Sparse]]
