"""Refit: the best weights for a mask that stands, by projected conjugate gradients.

Meng et al. 2024 (ALPS), arXiv:2406.07831, section 3.3 and algorithm 2: minimise the layer's error
``tr((B - B0) H (B - B0)^T)`` over weights B with the zeros of the mask, ten steps. With inputs
scaled so that H has a unit diagonal, the paper's preconditioner is the identity. Every output has
steps of its own length, so rows know nothing of each other. The error falls at every step, which
is asserted.

Shape suffixes: R rows of all matrices together, I inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared, Sparse
from megatron_prune.sparsity.obs import moments_of

STEPS = 10
_ROUNDING = 1e-5  # relative; by so much may an error that is as low as it gets rise
_NOTHING = 1e-7  # of the outputs' size; an error below it is rounding


def normalise(inputs: Inputs, damping: float) -> Prepared:
    """Second moments with a unit diagonal, and by what weights are scaled to meet them.

    ``H = X^T X + damping * mean(diag)``, ``e = sqrt(diag H)``, ``H / (e e^T)``; ALPS' code, which
    does this before all else. Where the diagonal is 0, e is 1.

    Returns:
        moments_II float32 with diagonal 1 (0 of dead inputs without damping), scale_I float32,
        dead_I bool: inputs that never fire.

    Raises:
        DamagedError: second moments that are no finite numbers.
    """
    gram = moments_of(inputs).double()
    dead = gram.diagonal() == 0
    gram.diagonal().add_(damping * gram.diagonal().mean())
    scale = gram.diagonal().sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    gram.div_(scale).div_(scale[:, None])
    return {"moments_II": gram.float(), "scale_I": scale.float(), "dead_I": dead}


def refitted(method: Method) -> Method:
    """A method whose masks are refitted, starting from its weights.

    Costs ten products [R, I] x [I, I] beyond the method itself.
    """

    def prepare(inputs: Inputs, how: How) -> Prepared:
        own = method.prepare(inputs, how)
        extra = normalise(inputs, how.damping)
        return {**own, "dead_I": extra["dead_I"], **{f"refit_{k}": extra[k] for k in _REFIT}}

    def prune(
        weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
    ) -> list[Sparse]:
        found = method.prune(weights, prepared, asked, how, dealt)
        extra = {k: prepared[f"refit_{k}"] for k in _REFIT}
        kept = refit_weights(weights, [each.weight_RI for each in found], extra, prepared["dead_I"])
        return [Sparse(weight_RI=w, close=each.close) for w, each in zip(kept, found)]

    return replace(method, needs="gram", updates=True, prepare=prepare, prune=prune)


_REFIT = ("moments_II", "scale_I")


def refit_weights(
    dense: Sequence[Tensor], sparse: Sequence[Tensor], prepared: Prepared, dead_I: Tensor
) -> list[Tensor]:
    """Sparse matrices [R, I], refitted to the dense ones, which share an input, at once."""
    scale_I = prepared["scale_I"]
    wanted_RI, start_RI = (torch.cat(list(x)).mul_(scale_I) for x in (dense, sparse))
    wanted_RI[:, dead_I] = 0
    start_RI[:, dead_I] = 0
    found_RI = refit(start_RI, wanted_RI, prepared["moments_II"]).div_(scale_I).add_(0.0)  # no -0.0
    return [part.clone() for part in found_RI.split([len(weight) for weight in sparse])]


def refit(start_RI: Tensor, wanted_RI: Tensor, moments_II: Tensor, steps: int = STEPS) -> Tensor:
    """Weights with the start's zeros whose outputs are nearer to those of the wanted ones.

    Algorithm 2 of the paper in float32. The paper stops when the residual is small, its code in
    effect never; so neither do we. An output with no weights left stays as it is. Where numbers
    grow beyond float32 it ends, and weights may be no numbers.

    Args:
        start_RI, wanted_RI: weights, their inputs scaled as the moments are.
        moments_II: with a unit diagonal.
    """
    found = start_RI.clone()
    support = (start_RI != 0).float()
    left = (wanted_RI - found) @ moments_II  # the gradient's negative, of all weights
    gradient = left * support
    direction = gradient.clone()
    square_R1 = _dot(gradient, gradient)
    error = _error(wanted_RI, found, left)
    size = float(wanted_RI.square().sum(dtype=torch.float64))  # outputs are about as large
    for _ in range(steps):
        product = direction @ moments_II
        length_R1 = _ratio(square_R1, _dot(direction, product))
        found.addcmul_(direction, length_R1)
        left.addcmul_(product, length_R1, value=-1)
        before, error = error, _error(wanted_RI, found, left)
        if not math.isfinite(error):  # numbers beyond float32; whoever takes them looks at them
            break
        rounding = _ROUNDING * abs(before) + _NOTHING * size
        assert error <= before + rounding, f"the layer's error rose from {before} to {error}"
        torch.mul(left, support, out=gradient)
        last_R1, square_R1 = square_R1, _dot(gradient, gradient)
        direction.mul_(_ratio(square_R1, last_R1)).add_(gradient)
    return found


def _error(wanted_RI: Tensor, found_RI: Tensor, left_RI: Tensor) -> float:
    """``tr((B - B0) H (B - B0)^T)``, with ``left = (B0 - B) H``."""
    return float(_dot(wanted_RI - found_RI, left_RI).sum(dtype=torch.float64))


def _dot(one_RI: Tensor, other_RI: Tensor) -> Tensor:
    """Of each row, [R, 1]."""
    return (one_RI * other_RI).sum(1, keepdim=True)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """0 where there is nothing to divide by."""
    return torch.where(below > 0, above / below, torch.zeros_like(above))
