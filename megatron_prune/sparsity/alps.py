"""ALPS: zeros and weights found together by ADMM, whose penalty grows as the zeros settle.

Meng et al. 2024, arXiv:2406.07831, eq. 1, 4, 6, 28 and appendix B.1, as in the authors' code
(mazumder-lab/ALPS at 8af9e6b). Minimised is the layer's error ``tr((B - B0) H (B - B0)^T)``; B is
free, its copy D has the zeros, V holds them together:

    B = (B0 H - V + rho D) (H + rho)^-1;  D = P(B + V / rho);  V = V + rho (B - D)

P keeps the largest: of the whole matrix, or N of every M. The inverse at any rho is that of an
eigendecomposition, which cannot fail where a Cholesky can. The support of P(B) is then refitted.

Shape suffixes: R this rank's rows of one matrix, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared, Sparse
from megatron_prune.sparsity.projection import Projection
from megatron_prune.sparsity.refit import normalise, refit

# all of appendix B.1
_RHO, _RHO_MOST, _STEPS, _EVERY, _LEAST_STEPS = 0.1, 1e6, 300, 3, 30
_MANY, _SOME, _SETTLED = 0.1, 0.005, 3e-4  # of the support that changed


def prepare(inputs: Inputs, how: How) -> Prepared:
    """The second moments with a unit diagonal, and their eigenvectors and eigenvalues.

    The decomposition is float64, some ``9 I^3`` multiply-adds and four times ``8 I^2`` bytes; its
    eigenvalues are clipped at 0.

    Returns:
        What `refit.normalise` does, vectors_II and values_I float32.

    Raises:
        DamagedError: second moments that are no finite numbers.
    """
    prepared = normalise(inputs, how.damping)
    values, vectors = torch.linalg.eigh(prepared["moments_II"].double())
    return {**prepared, "vectors_II": vectors.float(), "values_I": values.clamp(min=0).float()}


def prune(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    """See `Method`. Costs two products [R, I] x [I, I] a step, of which there are 30 to 300, and
    eleven more; over ranks six sums a step for zeros anywhere, one in three for a pattern."""
    scale_I = prepared["scale_I"]
    done = []
    for weight in weights:
        dense = weight * scale_I
        dense[:, prepared["dead_I"]] = 0
        projection = Projection.of(dense, asked, dealt)
        free = _solve(dense, prepared, projection, dealt)
        goes = projection.goes(free)
        close = projection.close(free, goes)
        found = refit(free * ~goes, dense, prepared["moments_II"]).div_(scale_I)
        done.append(Sparse(weight_RI=found.add_(0.0), close=close))  # no -0.0
    return done


def _solve(dense: Tensor, prepared: Prepared, projection: Projection, dealt: Dealt) -> Tensor:
    """B after the last step. All ranks take the same number of steps: what changed is summed."""
    vectors, values_I = prepared["vectors_II"], prepared["values_I"]
    target = dense @ prepared["moments_II"]
    rho, started = _RHO, False
    goes = projection.goes(dense)
    first = dense * ~goes
    kept = max(int(dealt.total((~goes).count_nonzero().view(1))), 1)
    sparse, dual, last = first, torch.zeros_like(dense), goes
    free = dense
    for step in range(_STEPS):
        pull = (target - dual).add_(sparse, alpha=rho) @ vectors
        free = pull.div_(values_I + rho) @ vectors.t()
        mixed = free.add(dual, alpha=1 / rho)
        goes = projection.goes(mixed)
        sparse = mixed.mul_(~goes)
        dual.add_(free, alpha=rho).sub_(sparse, alpha=rho)
        if (step + 1) % _EVERY:
            continue
        changed = int(dealt.total((goes != last).count_nonzero().view(1)))
        last = goes
        if changed > _SOME * kept:
            rho, started = rho * (1.3 if changed > _MANY * kept else 1.2), True
        elif changed and started:
            rho *= 1.1
        elif started:
            break
        else:
            rho /= 5
            if changed:  # too stiff to move: again from the start
                sparse, dual = first, torch.zeros_like(dense)
        rho = min(rho, _RHO_MOST)
        if step >= _LEAST_STEPS and changed < _SETTLED * kept:
            break
    return free


METHOD = Method(name="alps", needs="gram", updates=True, prepare=prepare, prune=prune)
