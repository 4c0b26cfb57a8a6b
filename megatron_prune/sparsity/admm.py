"""ADMM-Grad: ADMM with one inverse and twenty steps, for small machines.

Boža 2024, arXiv:2401.02938, algorithms 1 and 2, as in the author's code (fmfi-compbio/admm-pruning,
``lib/admm.py``): inputs scaled to norm 1, a tenth added to the diagonal, penalty 1,

    Z = (W + U) M;  U = U + W - Z;  W = (W0 (H + .1) + Z - U) (H + .1 + 1)^-1

with a new mask M in the first fifteen steps. For zeros anywhere M has all its zeros from the first
step on; for N:M the N largest of a group always stay and of the rest more go at every step, by one
threshold for the matrix and a cubic schedule (Zhu and Gupta 2017, arXiv:1710.01878).

Shape suffixes: R this rank's rows of one matrix, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared, Sparse
from megatron_prune.sparsity.projection import Projection
from megatron_prune.sparsity.refit import normalise

_STEPS, _WITH_NEW_MASK = 20, 15
_DAMPING, _PENALTY = 0.1, 1.0  # of a unit diagonal; the author's, whatever other methods take


def prepare(inputs: Inputs, how: How) -> Prepared:
    """The damped second moments and the inverse with the penalty; ``I^3`` multiply-adds.

    The matrix has eigenvalues from 1.1 to 1.1 + I, so nothing can fail.

    Returns:
        What `refit.normalise` does without damping, and inverse_II float32.

    Raises:
        DamagedError: second moments that are no finite numbers.
    """
    prepared = normalise(inputs, 0.0)
    moments = prepared["moments_II"].clone()
    moments.diagonal().add_(_DAMPING)
    ridge = moments.double()
    ridge.diagonal().add_(_PENALTY)
    inverse = torch.linalg.inv(ridge).float()
    return {**prepared, "moments_II": moments, "inverse_II": inverse}


def prune(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    """See `Method`. Costs 21 products [R, I] x [I, I]; over ranks five sums in 15 steps."""
    scale_I = prepared["scale_I"]
    done = []
    for weight in weights:
        dense = weight * scale_I
        dense[:, prepared["dead_I"]] = 0
        found, close = _solve(dense, prepared, Projection.of(dense, asked, dealt))
        done.append(Sparse(weight_RI=found.div_(scale_I).add_(0.0), close=close))  # no -0.0
    return done


def _solve(dense: Tensor, prepared: Prepared, projection: Projection) -> tuple[Tensor, int]:
    target, inverse = dense @ prepared["moments_II"], prepared["inverse_II"]
    free, dual, close = dense, torch.zeros_like(dense), 0
    goes = projection.zero_RI
    for step in range(_STEPS):
        mixed = free + dual
        if step < _WITH_NEW_MASK:
            share = 1.0
            if projection.pattern is not None:
                share = 1 - (1 - (step + 1) / _WITH_NEW_MASK) ** 3
            goes = projection.goes(mixed, share)
            if step == _WITH_NEW_MASK - 1:
                close = projection.close(mixed, goes)
        sparse = mixed * ~goes
        dual.add_(free).sub_(sparse)
        free = (target - dual).add_(sparse) @ inverse
    return free.add_(dual).mul_(~goes), close


METHOD = Method(name="admm", needs="gram", updates=True, prepare=prepare, prune=prune)
