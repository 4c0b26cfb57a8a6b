"""Optimal brain surgery, column by column: the sweep that SparseGPT and the ablations share.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1. With H the second moments of the inputs
and U the upper Cholesky factor of H^-1, removing ``W_ij`` costs ``W_ij^2 / U_jj^2``, and
``W_ij / U_jj`` times row j of U is taken off the columns to its right, which makes up for it.
Columns go in their order. Rows know nothing of each other but where a threshold is one of all.

How it is done here: inputs lie one below the other, so that a column of the sweep is contiguous;
all matrices that share the input go at once, side by side; what a column owes to those before it is
taken off when its turn comes (a product of a matrix and a vector), and what later blocks owe to one
in a product of matrices. U is brought to a unit diagonal first, which saves a division a weight.

Shape suffixes: R rows of all matrices together, I inputs, N inputs of a block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from megatron_prune.errors import DamagedError
from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity.choosing import lowest_of_members
from megatron_prune.sparsity.magnitude import lowest_of_matrices
from megatron_prune.sparsity.method import Asked, How, Inputs, Pattern, Prepared, Sparse

Keys = Callable[[Tensor, slice], Tensor]
"""What weights are compared by: of a block or group of current weights [N, R], and which inputs
they are of, new keys [N, R], not below zero, the lowest of which go."""

_SUB_BLOCK = 32  # columns; 16 and 64 take as long
_SMALL = 64  # below it, a triangle is inverted by LAPACK


def factorise(inputs: Inputs, how: How) -> Prepared:
    """The upper Cholesky factor of the inverse of the damped second moments, and the dead inputs.

    ``H = 2 / windows * X^T X``; of an input that never fires the diagonal is 1; ``damping`` times
    the mean of the diagonal is added to it. With H turned about both ways, ``L L^T``, the factor is
    ``L^-1`` turned about: the inverse of H is never formed. Costs ``2 I^3 / 3`` multiply-adds.

    Where H is not positive definite in float32, the damping is raised by tens, with a warning.

    Returns:
        factor_II float32, dead_I bool.

    Raises:
        DamagedError: second moments that are no finite numbers.
    """
    gram = moments_of(inputs)
    dead = gram.diagonal() == 0
    gram = gram * (2 / inputs.windows)
    gram.diagonal()[dead] = 1
    mean = gram.diagonal().mean()
    damping = how.damping
    turned = gram.flip(0, 1)
    while True:
        ridge = turned.clone()
        ridge.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(ridge)
        if not bool(failed):
            break
        raised = 10 * damping if damping else 1e-4
        warnings.warn(
            f"the second moments of {len(gram)} inputs are not positive definite with damping "
            f"{damping:g}; it is raised to {raised:g}",
            stacklevel=2,
        )
        damping = raised
    return {"factor_II": _inverse_of_lower(lower).flip(0, 1), "dead_I": dead}


def moments_of(inputs: Inputs) -> Tensor:
    """X^T X of the inputs, which are finite.

    Raises:
        DamagedError: they are not.
    """
    assert inputs.gram_II is not None, "a method that needs second moments was given none"
    if not inputs.gram_II.isfinite().all():
        raise DamagedError("second moments of inputs that are no finite numbers")
    return inputs.gram_II


def sweep(
    weights: Sequence[Tensor],
    prepared: Prepared,
    choice: Keys | Sequence[tuple[Tensor, int]],
    asked: Asked,
    how: How,
    dealt: Dealt,
) -> list[Sparse]:
    """Prune with the update; what goes is given, or chosen on the way from weights already updated.

    By keys are chosen, without a pattern, of each block of ``block_size`` inputs and each matrix
    all up to the one at place ``int(count * share)`` of its keys on all ranks, so one more than
    asked for; with a pattern the lowest of each group, when its first column's turn has come.
    Weights that are zero at the start are always among what goes.

    Costs ``R I^2 / 2`` multiply-adds, and over ranks four sums a block.

    Args:
        prepared: see `factorise`.
        choice: keys, or of each matrix the mask [R, I] of what goes and how many were close.
    """
    block_size = how.block_size
    if asked.pattern is not None:  # no decision hangs on blocks then, and none cuts a group in two
        block_size = max(block_size // asked.pattern.group, 1) * asked.pattern.group
    state = _State(weights, prepared, block_size)
    keys = choice if callable(choice) else None
    if not callable(choice):
        state.give(choice)
    by_group = (keys, asked.pattern) if keys is not None and asked.pattern is not None else None
    inputs = len(state.weight_IR)
    for start in range(0, inputs, block_size):
        block = slice(start, min(start + block_size, inputs))
        if keys is not None and asked.pattern is None:
            state.choose_in_block(block, keys, asked.share, dealt)
        _sweep_block(state, block, by_group)
        owed_NX = state.unit_II[block, block.stop :]
        errors_NR = state.error_NR[: block.stop - start]
        state.weight_IR[block.stop :].addmm_(owed_NX.t(), errors_NR, alpha=-1)
    return state.answers()


class _State:
    """A sweep on its way: the current weights, what goes, and the errors of a block."""

    def __init__(self, weights: Sequence[Tensor], prepared: Prepared, block_size: int) -> None:
        ends = [0, *accumulate(len(weight) for weight in weights)]
        self.matrices = [slice(start, end) for start, end in pairwise(ends)]
        self.close = [0] * len(weights)
        inputs = weights[0].shape[1]
        self.weight_IR = weights[0].new_empty(inputs, ends[-1])
        for matrix, weight in zip(self.matrices, weights):
            self.weight_IR[:, matrix] = weight.t()
        self.weight_IR[prepared["dead_I"]] = 0
        self.goes_IR = self.weight_IR == 0
        self.has_zeros = bool(self.goes_IR.any())
        factor_II = prepared["factor_II"]
        self.unit_II = factor_II / factor_II.diagonal()[:, None]
        self.error_NR = self.weight_IR.new_empty(min(block_size, inputs), ends[-1])

    def give(self, masks: Sequence[tuple[Tensor, int]]) -> None:
        for i, (mask_RI, close) in enumerate(masks):
            self.goes_IR[:, self.matrices[i]] |= mask_RI.t()
            self.close[i] += close

    def keys(self, keys: Keys, inputs: slice, rows: slice) -> Tensor:
        """Of weights that are zero from the start they are 0."""
        found = keys(self.weight_IR[inputs, rows], inputs)
        return found.mul_(~self.goes_IR[inputs, rows]) if self.has_zeros else found

    def choose_in_block(self, block: slice, keys: Keys, share: float, dealt: Dealt) -> None:
        found = [self.keys(keys, block, matrix) for matrix in self.matrices]
        for i, (mask_NR, close) in enumerate(lowest_of_matrices(found, share, dealt)):
            self.goes_IR[block, self.matrices[i]] |= mask_NR
            self.close[i] += close

    def choose_in_group(self, group: slice, keys: Keys, pattern: Pattern) -> None:
        mask_MR, close_R = lowest_of_members(self.keys(keys, group, slice(None)), pattern)
        self.goes_IR[group] |= mask_MR
        if close_R is not None:
            for i, matrix in enumerate(self.matrices):
                self.close[i] += int(close_R[matrix].sum())

    def answers(self) -> list[Sparse]:
        self.weight_IR.mul_(~self.goes_IR)
        return [
            Sparse(weight_RI=self.weight_IR[:, matrix].t().contiguous().add_(0.0), close=close)
            for matrix, close in zip(self.matrices, self.close)
        ]


def _sweep_block(state: _State, block: slice, by_group: tuple[Keys, Pattern] | None) -> None:
    """Take the columns of a block in their order, and leave its errors in the state.

    A few columns at a time: each takes off what it owes to those before it in its turn, and all
    what they owe to these few in one product. ``by_group`` the few are a group, which is brought
    up to date before it is decided on.
    """
    few = by_group[1].group if by_group else _SUB_BLOCK
    weight_NR, goes_NR = state.weight_IR[block], state.goes_IR[block]
    unit_NN, error_NR = state.unit_II[block, block], state.error_NR
    count = len(weight_NR)
    for start in range(0, count, step := max(_SUB_BLOCK // few, 1) * few):
        stop = min(start + step, count)
        for first in range(start, stop, few):
            last = min(first + few, stop)
            if by_group:
                owed = unit_NN[start:first, first:last].t()
                weight_NR[first:last].addmm_(owed, error_NR[start:first], alpha=-1)
                group = slice(block.start + first, block.start + last)
                state.choose_in_group(group, *by_group)
            part = slice(first, last)
            _sweep_few(weight_NR[part], goes_NR[part], unit_NN[part, part], error_NR[part])
        weight_NR[stop:].addmm_(unit_NN[start:stop, stop:].t(), error_NR[start:stop], alpha=-1)


def _sweep_few(weight_NR: Tensor, goes_NR: Tensor, unit_NN: Tensor, error_NR: Tensor) -> None:
    """The columns one by one: two operations each, so what they see is taken apart beforehand."""
    owed_NN, errors_RN = unit_NN.t().contiguous(), error_NR.t()
    columns = zip(weight_NR.unbind(), goes_NR.float().unbind(), owed_NN.unbind(), error_NR.unbind())
    for i, (weight, goes, owed, error) in enumerate(columns):
        if i:
            weight.addmv_(errors_RN[:, :i], owed[:i], alpha=-1)
        torch.mul(weight, goes, out=error)


def _inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangle, by halves: mostly products, thrice as fast as LAPACK's."""
    size = len(lower)
    if size <= _SMALL:
        return torch.linalg.solve_triangular(
            lower, torch.eye(size, dtype=lower.dtype, device=lower.device), upper=False
        )
    half = size // 2
    out = torch.zeros_like(lower)
    out[:half, :half] = _inverse_of_lower(lower[:half, :half])
    out[half:, half:] = _inverse_of_lower(lower[half:, half:])
    torch.mm(out[half:, half:], lower[half:, :half] @ out[:half, :half], out=out[half:, :half])
    out[half:, :half].neg_()
    return out
