"""SparseGPT: what goes is what costs least, and what stays makes up for it.

Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1, as the authors' code and Wanda's have it:
of each block of ``block_size`` inputs all weights of a matrix up to one threshold of
``W_ij^2 / U_jj^2``; with a pattern the lowest of each group, decided when the sweep comes to it.
See `obs` for the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_prune.solve.kselect import Dealt
from megatron_prune.sparsity.method import Asked, How, Method, Prepared, Sparse
from megatron_prune.sparsity.obs import factorise, sweep


def prune(
    weights: Sequence[Tensor], prepared: Prepared, asked: Asked, how: How, dealt: Dealt
) -> list[Sparse]:
    """See `Method` and `obs.sweep`."""
    diagonal_I1 = prepared["factor_II"].diagonal()[:, None]

    def cost(weight_NR: Tensor, inputs: slice) -> Tensor:
        return (weight_NR / diagonal_I1[inputs]).square_()

    return sweep(weights, prepared, cost, asked, how, dealt)


METHOD = Method(name="sparsegpt", needs="gram", updates=True, prepare=factorise, prune=prune)
