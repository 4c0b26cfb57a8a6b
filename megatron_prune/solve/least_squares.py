"""Least squares from second moments: the weights that best stand in for what was dropped.

Pure arithmetic on small matrices; who collects the moments, and from which model, is `engine`'s.

Shape suffixes: T tokens, K kept inputs of a projection, D its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums over tokens of a projection's kept inputs X_TK and of the outputs Y_TD wanted from them.

    All float64; ``(K + D) * K * 8`` bytes.

    Attributes:
        count: tokens.
        gram_KK: X^T X.
        cross_DK: Y^T X.
        input_sum_K, target_sum_D: of X and of Y.
        target_square: of every value of Y, squared.
    """

    count: int
    gram_KK: Tensor
    cross_DK: Tensor
    input_sum_K: Tensor
    target_sum_D: Tensor
    target_square: float

    @property
    def is_finite(self) -> bool:
        """Whether every sum is a number."""
        # a NaN or an infinity in X or Y reaches these: the squares cannot cancel
        return bool(self.gram_KK.diagonal().isfinite().all()) and bool(
            torch.tensor(self.target_square).isfinite()
        )


@dataclass(frozen=True, kw_only=True)
class Affine:
    """A projection: weight_DK and, where the family has one, bias_D. float64."""

    weight_DK: Tensor
    bias_D: Tensor | None


def fit(moments: Moments, kept: Affine, damping: float) -> Affine:
    """The projection of the kept inputs that comes closest to the wanted outputs.

    Minimises ``||Y - X W'^T||^2 + lam ||W' - W||^2`` with ``lam = damping * mean(diag(X^T X))``:
    ``W' = (Y^T X + lam W) (X^T X + lam)^-1``. With Y the full projection's own output this is
    ``W_full C[:,kept] C[kept,kept]^-1`` for C its input's second moment (as in SlimGPT, OSSCAR,
    ZipLM). The damping pulls towards the kept weights, not towards zero: whatever its size, the
    result is never further from Y than the kept weights are, and where nothing is lost it is those
    weights. Where there is a bias the moments are centred and the bias takes up the mean of what
    was dropped; where there is none, none appears. Kept inputs that are zero leave the weights as
    they are.

    Costs ``K^3 / 3 + 2 D K^2`` multiply-adds in float64.

    Args:
        kept: the full projection's columns of the kept inputs, and its bias.

    Raises:
        ConfigError: the kept inputs are linearly dependent and the damping is too small.
    """
    gram, cross = moments.gram_KK, moments.cross_DK
    mean_K, mean_D = moments.input_sum_K / moments.count, moments.target_sum_D / moments.count
    if kept.bias_D is not None:
        gram = gram - moments.count * torch.outer(mean_K, mean_K)
        cross = cross - moments.count * torch.outer(mean_D, mean_K)
    strength = damping * gram.diagonal().mean()
    weight = kept.weight_DK
    if bool(gram.any()):  # else any weight does as well
        ridge = gram.clone()
        ridge.diagonal().add_(strength)
        factor, failed = torch.linalg.cholesky_ex(ridge)
        if bool(failed):
            raise ConfigError(
                f"the {len(gram)} kept inputs are linearly dependent over {moments.count} tokens "
                f"at --repair-damping {damping:g}; raise it, or give more text"
            )
        weight = torch.cholesky_solve((cross + strength * weight).T, factor).T.contiguous()
    bias = None if kept.bias_D is None else mean_D - weight @ mean_K
    return Affine(weight_DK=weight, bias_D=bias)


def relative_error(moments: Moments, found: Affine) -> float:
    """``||Y - X W^T - b|| / ||Y||`` over all tokens, from the moments alone.

    The difference of large sums: below about 1e-4 it is rounding.
    """
    weight = found.weight_DK
    square = moments.target_square
    square += float(((weight @ moments.gram_KK - 2 * moments.cross_DK) * weight).sum())
    if (bias := found.bias_D) is not None:
        square += float(moments.count * bias @ bias - 2 * bias @ moments.target_sum_D)
        square += float(2 * bias @ (weight @ moments.input_sum_K))
    return max(square, 0.0) ** 0.5 / max(moments.target_square, 1e-300) ** 0.5


def norm_ratio(energy_D: Tensor, kept: Tensor | None) -> float:
    """By how much a norm's weight grows or shrinks when only some hidden channels are left.

    RMSNorm divides by the root mean square of the channels it sees. With ``e_c`` the mean over
    tokens of ``(x_c / rms(x))^2`` that root is, of the kept channels, about
    ``sqrt(mean of e over them)`` times what it was; the norm's epsilon, which is in both roots, is
    what e lacks to 1 on average.

    Args:
        energy_D: e, 1 on average but for the norm's epsilon.
        kept: [n] int64, None for all.
    """
    energy = energy_D.double()
    return 1.0 if kept is None else float((energy[kept].mean() + 1 - energy.mean()).sqrt())
