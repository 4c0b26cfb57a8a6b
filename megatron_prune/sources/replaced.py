"""A model with some of its tensors replaced, and where the new ones wait meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from megatron_prune.files import write_file
from megatron_prune.model.axes import axes_of, norm_before, split_dim
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.sources.source import DerivedSource, Source


class Tensors(Mapping[str, Tensor]):
    """Replaced tensors, kept in a directory that all ranks see: 40% of a model fits no rank's host.

    One writes, all read; the files are read slice by slice.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._names = directory, dict[str, None]()

    def put(self, name: str, x: Tensor, *, here: bool = True) -> None:
        """Add or replace a tensor; every rank says so, and the one with ``here`` writes it."""
        if here:
            from safetensors.torch import save

            self._path(name).unlink(missing_ok=True)
            write_file(self._path(name), save({"x": x.contiguous()}))
        self._names[name] = None

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"

    def part(self, name: str, dim: int, start: int, stop: int | None) -> Tensor:
        """Rows or columns ``[start, stop)`` of a tensor."""
        with safe_open(self._path(name), framework="pt") as file:
            index = (*(slice(None),) * dim, slice(start, stop))
            found: Tensor = file.get_slice("x")[index]
            return found

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path(name), framework="pt") as file:
            found: Tensor = file.get_tensor("x")
            return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RepairedSource(DerivedSource):
    """A model with some of its tensors replaced; everything else is read through."""

    def __init__(self, source: Source, replaced: Tensors) -> None:
        super().__init__(source)
        self._replaced = replaced

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name not in self._replaced:
            return self._source.read(name, start, stop)
        axes = axes_of(name)
        dim = split_dim(axes)
        if dim is None:
            return self._replaced[name]
        rows = self.config.shape.rows(axes[dim])
        upto = None if stop is None else stop * rows
        return self._replaced.part(name, dim, start * rows, upto)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What readers of a norm take instead of its D dense outputs.

    Attributes:
        readers_DK: [D, K] float32 on any device; a reader ``W`` becomes ``W readers_DK``.
        norm_K: [K] in the stored dtype, the norm's new weight.
    """

    readers_DK: Tensor
    norm_K: Tensor

    @classmethod
    def of(cls, estimate_DK: Tensor, weight_D: Tensor) -> Mix:
        """From the norm's dense input as estimated from the kept channels, and its dense weight.

        ``diag(weight) estimate`` is what readers take; its columns are brought to length 1, their
        lengths become the norm's weight, so that readers stay as large as they were: where all is
        kept the lengths are the weight's absolute values. Optimizers count on it: with the weight
        folded in (SmolLM2's are 0.03 to 0.4) Adam's steps are too large for the readers.
        """
        columns = weight_D.to(estimate_DK.device).float()[:, None] * estimate_DK
        lengths = columns.norm(dim=0)
        norm_K = torch.where(lengths > 0, lengths, 1.0).to(weight_D.dtype)
        return cls(readers_DK=columns / norm_K.float(), norm_K=norm_K)


class MixedSource(DerivedSource):
    """A pruned model whose readers of some norms take mixtures of the hidden channels.

    Args:
        wide: the same pruned model with all hidden channels.
        mixes: by norm.
    """

    def __init__(self, pruned: Source, wide: Source, mixes: Mapping[str, Mix]) -> None:
        super().__init__(pruned)
        self._wide, self._mixes = wide, mixes

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._mixes:
            return self._mixes[name].norm_K.cpu()
        norm = norm_before(name)
        if norm is None or norm not in self._mixes:
            return self._source.read(name, start, stop)
        readers, x = self._mixes[norm].readers_DK, self._wide.read(name, start, stop)
        return (x.to(readers.device).float() @ readers).to(x.dtype).cpu()
