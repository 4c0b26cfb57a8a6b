"""One-shot sparsity as plain loops: what `sparse_step.py` measures the package against.

The procedures of the papers, as their authors' codes go about them, written from the formulas: one
matrix at a time, each for itself though some share an input; whole sorts where a threshold is
wanted; SparseGPT column by column; N:M group by group. Magnitude and Wanda: arXiv:2306.11695;
SparseGPT: arXiv:2301.00774, algorithm 1; ADMM: arXiv:2401.02938; ALPS and its conjugate gradients:
arXiv:2406.07831. No step is left out or made slower than it has to be.

Shape suffixes: O outputs, I inputs, N inputs of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_prune.sparsity.method import Asked, Inputs, Pattern

Plain = Callable[[Tensor, Inputs, Asked], Tensor]
"""A procedure: a matrix [O, I], what enters it, what is asked; the matrix with its zeros."""

Metric = Callable[[Tensor, Tensor, slice], Tensor]
"""What weights of a block [O, N] are compared by, given the factor's diagonal in it [N]."""

BLOCK, DAMPING = 128, 0.01


def magnitude(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    return weight.masked_fill(magnitude_mask(weight, inputs, asked), 0)


def wanda(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    return weight.masked_fill(wanda_mask(weight, inputs, asked), 0)


def magnitude_mask(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    """All up to the one at place ``int(count * share)`` of the sorted sizes."""
    size = weight.abs()
    return _lowest_of_groups(size, asked.pattern) if asked.pattern else _upto(size, asked.share)


def wanda_mask(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    """``int(inputs * share)`` of each row, by a sort of it."""
    score = weight.abs() * inputs.squares_I.float().sqrt()
    if asked.pattern:
        return _lowest_of_groups(score, asked.pattern)
    order = score.sort(dim=1, stable=True).indices[:, : int(score.shape[1] * asked.share)]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def wanda_variant(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    """Of each row the smallest whose running sum is within alpha times the row's, alpha by
    bisection until the share is within 0.001 or the interval is."""
    score = weight.abs() * inputs.squares_I.float().sqrt()
    ordered = score.sort(dim=1, stable=True).values
    running, whole = ordered.cumsum(1), score.sum(1)
    alpha, low, high = 0.4, 0.0, 0.8
    while True:
        count = (running <= alpha * whole[:, None]).sum(1, keepdim=True)
        mask = score <= ordered.gather(1, (count - 1).clamp(min=0))
        reached = mask.float().mean()
        if abs(reached - asked.share) <= 0.001 or high - low < 0.001:
            return weight.masked_fill(mask, 0)
        low, high = (low, alpha) if reached > asked.share else (alpha, high)
        alpha = (low + high) / 2


def sparsegpt(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    return _sweep(weight, inputs, asked, lambda w, diagonal, block: (w / diagonal) ** 2)


def magnitude_seq(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    return _sweep(weight, inputs, asked, magnitude_mask(weight, inputs, asked))


def wanda_seq(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    return _sweep(weight, inputs, asked, wanda_mask(weight, inputs, asked))


def magnitude_iter(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    return _sweep(weight, inputs, asked, lambda w, diagonal, block: w.abs())


def wanda_iter(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    norm = inputs.squares_I.float().sqrt()
    return _sweep(weight, inputs, asked, lambda w, diagonal, block: w.abs() * norm[block])


def refitted(mask_of: Plain) -> Plain:
    """Ten conjugate-gradient steps for the zeros of another procedure, from its weights."""

    def run(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
        moments, scale = _normalised(inputs, DAMPING)
        return _refit(mask_of(weight, inputs, asked) * scale, weight * scale, moments) / scale

    return run


def admm(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    """ADMM-Grad: one inverse, twenty steps, a new mask in fifteen of them."""
    moments, scale = _normalised(inputs, 0.0)
    moments.diagonal().add_(0.1)
    inverse = torch.linalg.inv(moments + torch.eye(len(moments)))
    dense = weight * scale
    target, free, dual = dense @ moments, dense, torch.zeros_like(dense)
    goes = dense == 0
    for step in range(20):
        mixed = free + dual
        if step < 15:
            share = 1 - (1 - (step + 1) / 15) ** 3 if asked.pattern else 1.0
            goes = _smallest(mixed, asked, share)
        sparse = mixed.masked_fill(goes, 0)
        dual = dual + free - sparse
        free = (target + sparse - dual) @ inverse
    return (free + dual).masked_fill(goes, 0) / scale


def alps(weight: Tensor, inputs: Inputs, asked: Asked) -> Tensor:
    """ADMM with the penalty's schedule of appendix B.1, then the refit."""
    moments, scale = _normalised(inputs, DAMPING)
    dense = weight * scale
    values, vectors = torch.linalg.eigh(moments.double())
    values, vectors = values.clamp(min=0).float(), vectors.float()
    target, free, dual = dense @ moments, dense, torch.zeros_like(dense)
    goes = last = _smallest(dense, asked)
    first = sparse = dense.masked_fill(goes, 0)
    kept, rho, started = int((~goes).sum()), 0.1, False
    for step in range(300):
        free = ((target - dual + rho * sparse) @ vectors / (values + rho)) @ vectors.t()
        mixed = free + dual / rho
        goes = _smallest(mixed, asked)
        sparse = mixed.masked_fill(goes, 0)
        dual = dual + rho * (free - sparse)
        if (step + 1) % 3:
            continue
        changed, last = int((goes != last).sum()) / kept, goes
        if changed > 0.1:
            rho, started = rho * 1.3, True
        elif changed > 0.005:
            rho, started = rho * 1.2, True
        elif changed and started:
            rho *= 1.1
        elif started:
            break
        else:
            rho /= 5
            if changed:
                free, sparse, dual = dense, first, torch.zeros_like(dense)
        rho = min(rho, 1e6)
        if step >= 30 and changed < 3e-4:
            break
    return _refit(free.masked_fill(_smallest(free, asked), 0), dense, moments) / scale


PROCEDURES: dict[str, Plain] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "wanda, variant": wanda_variant,
    "sparsegpt": sparsegpt,
    "magnitude, seq": magnitude_seq,
    "magnitude, iter": magnitude_iter,
    "wanda, seq": wanda_seq,
    "wanda, iter": wanda_iter,
    "wanda, refit": refitted(wanda),
    "sparsegpt, refit": refitted(sparsegpt),
    "admm": admm,
    "alps": alps,
}


def _upto(keys: Tensor, share: float) -> Tensor:
    return keys <= keys.flatten().sort().values[int(keys.numel() * share)]


def _lowest_of_groups(keys: Tensor, pattern: Pattern) -> Tensor:
    mask = torch.zeros_like(keys, dtype=torch.bool)
    for start in range(0, keys.shape[1], pattern.group):
        _choose_in_group(keys, mask, slice(start, start + pattern.group), pattern)
    return mask


def _choose_in_group(keys: Tensor, mask: Tensor, group: slice, pattern: Pattern) -> None:
    drop = pattern.group - pattern.keep
    lowest = keys[:, group].topk(drop, dim=1, largest=False).indices
    mask[:, group].scatter_(1, lowest, True)


def _smallest(weight: Tensor, asked: Asked, share: float = 1.0) -> Tensor:
    """A mask of the smallest, of the whole matrix or of each group; of a pattern a share of it."""
    square = weight.square()
    dropped = weight.numel() - round(weight.numel() * (1 - asked.share))
    if asked.pattern is not None:
        drop = asked.pattern.group - asked.pattern.keep
        groups = square.view(-1, asked.pattern.group)
        lowest = groups.topk(drop, dim=1, largest=False).indices
        goes = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, lowest, True)
        if share == 1:
            return goes.view_as(weight)
        square = square.masked_fill(~goes.view_as(weight), math.inf)
    count = round(dropped * share)
    first = square.flatten().topk(count, largest=False, sorted=False).indices
    goes = torch.zeros(weight.numel(), dtype=torch.bool).index_fill_(0, first, True)
    return goes.view_as(weight)


def _sweep(weight: Tensor, inputs: Inputs, asked: Asked, choice: Metric | Tensor) -> Tensor:
    """Algorithm 1, with a mask that is given, or found on the way by a metric: of each block one
    threshold, or of each group when its first column's turn has come."""
    assert inputs.gram_II is not None
    moments, weight = inputs.gram_II * (2 / inputs.windows), weight.clone()
    dead = moments.diagonal() == 0
    moments.diagonal()[dead] = 1
    weight[:, dead] = 0
    moments.diagonal().add_(DAMPING * moments.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        current, part = weight[:, block].clone(), factor[block, block]
        diagonal, errors = part.diagonal(), torch.zeros_like(current)
        if isinstance(choice, Tensor):
            mask = choice[:, block]
        elif asked.pattern is None:
            mask = _upto(choice(current, diagonal, block), asked.share)
        else:
            mask = torch.zeros_like(current, dtype=torch.bool)
        for i in range(current.shape[1]):
            if callable(choice) and asked.pattern and i % asked.pattern.group == 0:
                few = slice(i, i + asked.pattern.group)
                of = slice(start + few.start, start + few.stop)
                keys = choice(current[:, few], diagonal[few], of)
                _choose_in_group(keys, mask[:, few], slice(None), asked.pattern)
            column = current[:, i]
            error = column.masked_fill(~mask[:, i], 0) / part[i, i]
            current[:, i:] -= torch.outer(error, part[i, i:])
            errors[:, i] = error
        weight[:, block] = current.masked_fill(mask, 0)
        weight[:, block.stop :] -= errors @ factor[block, block.stop :]
    return weight


def _normalised(inputs: Inputs, damping: float) -> tuple[Tensor, Tensor]:
    """Second moments with a unit diagonal, and by what weights are scaled to meet them."""
    assert inputs.gram_II is not None
    gram = inputs.gram_II.clone()
    gram.diagonal().add_(damping * gram.diagonal().mean())
    scale = gram.diagonal().sqrt()
    scale[scale == 0] = 1
    return gram / scale / scale[:, None], scale


def _refit(start: Tensor, wanted: Tensor, moments: Tensor) -> Tensor:
    support, found = start != 0, start.clone()
    left = ((wanted - found) @ moments) * support
    direction = left
    square = (left * left).sum(1, keepdim=True)
    for _ in range(10):
        product = direction @ moments
        length = (square / (direction * product).sum(1, keepdim=True)).nan_to_num(0, 0, 0)
        found = found + length * direction
        left = (left - length * product) * support
        last, square = square, (left * left).sum(1, keepdim=True)
        direction = left + (square / last).nan_to_num(0, 0, 0) * direction
    return found
