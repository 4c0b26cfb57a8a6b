"""The ablations of Wanda's paper: masks of magnitude or Wanda, weights by SparseGPT's update.

Sun et al. 2023, arXiv:2306.11695, section 5 ("weight update"). ``seq``: the mask of the whole
matrix first, from the original weights, each as its method has it (Wanda by rows, magnitude by
matrix). ``iter``: from weights already updated, ``block_size`` inputs at a time with one threshold
over all rows for either metric, or group by group for N:M. See `obs` for the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity import magnitude, wanda
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared, Sparse
from megatron_prune.sparsity.obs import factorise, sweep


def ablation(name: str, order: str) -> Method:
    """Magnitude or Wanda with the update, in the order "seq" or "iter"."""
    prune = {
        ("magnitude", "seq"): _magnitude_seq,
        ("magnitude", "iter"): _magnitude_iter,
        ("wanda", "seq"): _wanda_seq,
        ("wanda", "iter"): _wanda_iter,
    }[name, order]
    prepare = factorise if name == "magnitude" else _with_norm
    return Method(name=name, needs="gram", updates=True, prepare=prepare, prune=prune)


def _with_norm(inputs: Inputs, how: How) -> Prepared:
    return {**factorise(inputs, how), **wanda.prepare(inputs, how)}


def _magnitude_seq(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    masks = magnitude.find(weights, prepared, asked, how, dealt)
    return sweep(weights, prepared, masks, asked, how, dealt)


def _wanda_seq(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    masks = wanda.find(weights, prepared, asked, how, dealt)
    return sweep(weights, prepared, masks, asked, how, dealt)


def _magnitude_iter(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    return sweep(weights, prepared, lambda w_NR, inputs: w_NR.abs(), asked, how, dealt)


def _wanda_iter(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    norm_I1 = prepared["norm_I"][:, None]

    def score(weight_NR: Tensor, inputs: slice) -> Tensor:
        return weight_NR.abs().mul_(norm_I1[inputs])

    return sweep(weights, prepared, score, asked, how, dealt)
