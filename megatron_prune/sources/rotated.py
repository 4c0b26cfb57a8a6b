"""The same model in another basis of its hidden state: channels that are principal components.

RMSNorm without a weight commutes with a rotation of its input, so a model whose norm weights are
folded into the projections that read them (but for their common size) computes the same function in
any orthonormal basis of the hidden state (SliceGPT, Ashkboos et al. 2024, arXiv:2401.15024, section
3.2). In the basis of the principal components of the normalised residual stream few channels hold
most of the energy, and pruning hidden channels loses less. One basis serves the whole model, so
nothing is added to the residual connections; but input and output embedding are no longer the same
matrix, and a tied model comes out untied, larger by one embedding.

Not for Megatron to know: the result is an ordinary model of its family. All weights of one norm are
the root mean square of what they were, so that the projections stay as large as they were: an
optimizer's steps are made for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.model.axes import axes_of, norm_before
from megatron_prune.model.blocks import EMBEDDING, OUTPUT
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.sources.source import DerivedSource, Source

RECORD = "megatron_prune_rotation"
"""Key of config.json under which a rotated model says where its basis came from."""


def principal_components(moment_DD: Tensor) -> Tensor:
    """An orthonormal basis of the hidden state, most energy first.

    Args:
        moment_DD: second moment of the normalised residual stream, float64.

    Returns:
        [D, D] float64, a component a column; the largest entry of each is positive, so that the
        basis does not depend on the solver's choice of sign.
    """
    basis = torch.linalg.eigh(moment_DD).eigenvectors.flip(1)
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    return basis * largest.sign()


class RotatedSource(DerivedSource):
    """A model in another basis of its hidden state, norm weights folded, computed slice by slice.

    Every read multiplies the slice by the basis in float32 and rounds to the stored dtype: logits
    of a float32 model agree to its rounding, those of a bf16 model to bf16's.

    Args:
        basis_DD: orthonormal, a new channel a column.
        record: where the basis came from, JSON values; kept in config.json.
    """

    def __init__(self, source: Source, basis_DD: Tensor, record: Mapping[str, Any]) -> None:
        super().__init__(source)
        self._forget_history()  # its plan and repair tell of channels that are no more
        hf_config = {**source.config.hf_config, RECORD: dict(record)}
        self.config = replace(source.config, tied=False, hf_config=hf_config)
        self._basis = basis_DD.float()

    def _stored(self, name: str) -> str:
        """Of the source's tensor: a tied model's output layer is its embedding."""
        return EMBEDDING.name if name == OUTPUT.name and self._source.config.tied else name

    def _size(self, weight_D: Tensor) -> Tensor:
        """What a norm's weights become: float32, a number that the stored dtype has."""
        least = torch.finfo(weight_D.dtype).tiny  # of a norm that lets nothing through
        size = weight_D.float().square().mean().sqrt().clamp(min=least)
        return size.to(weight_D.dtype).float()

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(self._stored(name))

    def origin(self, name: str) -> tuple[Source, str]:
        return self._source.origin(self._stored(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        axes = axes_of(name)
        x = self._source.read(self._stored(name), start, stop)
        if "D" not in axes:
            return x
        if axes == "D" and name.endswith("norm.weight"):
            return self._size(x).expand_as(x).to(x.dtype)
        if axes[0] == "D":  # writes into the stream, weight or bias
            return (self._basis.T @ x.float()).to(x.dtype)
        norm, turned = norm_before(name), x.float()
        if norm is not None:
            weight = self._source.read(norm)
            turned = turned * (weight.float() / self._size(weight))
        return (turned @ self._basis).to(x.dtype)
