"""A checkpoint with low-rank factors beside its weights, read as the model that they make together.

`train --lora-rank` writes such checkpoints, in torch_dist: the factors of a linear lie under its
own name, ``decoder.layers.mlp.linear_fc1.lora_B``, stacked over layers and ordered as the rows of
its weight; their rank, alpha and targets in ``common.pt``. Every tensor is read as W + B @ A
(`lora.merged`), so nothing that reads a checkpoint needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod
from pathlib import Path
from typing import Any

from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.model.axes import LAYER_PREFIX, axes_of, split_dim, split_layer
from megatron_prune.model.fusion import split, stored_name
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.lora import (
    PARTS,
    A,
    B,
    Lora,
    check_lora,
    check_rank,
    factor_shapes,
    is_factor,
    merged,
    parse_targets,
)
from megatron_prune.model.shape import ModelConfig
from megatron_prune.store.dist_index import Index
from megatron_prune.store.mcore_dist import DistSource

LORA = "lora"  # our key in common.pt
_BLOCK_ROWS = 512
_KINDS = {"rank": int, "alpha": float, "targets": list, "keep_zeros": bool}
_TARGET_OF = {name: target for target, names in PARTS.items() for name in names}


def lora_record(lora: Lora) -> dict[str, Any]:
    """What ``common.pt`` says of the factors; plain types only."""
    return {**asdict(lora), "targets": list(lora.targets)}


def read_lora(common: Any, where: Path, config: ModelConfig) -> Lora | None:
    """What ``common.pt`` says of the factors, None where there are none.

    Raises:
        DamagedError: it says what cannot be.
    """
    record = common.get(LORA) if isinstance(common, dict) else None
    if record is None:
        return None
    try:
        if {name: type(value) for name, value in record.items()} != _KINDS:
            raise ConfigError(f"wanted {', '.join(_KINDS)}")
        lora = Lora(**{**record, "targets": parse_targets([str(t) for t in record["targets"]])})
        check_lora(lora)
        check_rank(lora, config.shape)
    except (ConfigError, AttributeError) as error:
        raise DamagedError(f"{where}: {LORA} {str(record)[:80]}: {error}; copy it again") from None
    return lora


class LoraSource(DistSource):
    """A torch_dist checkpoint whose weights are read with their factors added."""

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        grid: ParallelGrid,
        index: Index,
        *,
        lora: Lora,
        companion_files: dict[str, Path],
        plan_path: Path | None,
        iteration: int,
    ) -> None:
        base = {key: found for key, found in index.tensors.items() if not is_factor(key)}
        super().__init__(
            directory,
            config,
            grid,
            replace(index, tensors=base),
            companion_files=companion_files,
            plan_path=plan_path,
            iteration=iteration,
        )
        self.lora: Lora = lora
        self._factors = {key: index.tensors[key] for key in set(index.tensors) - set(base)}
        self._check_factors()

    def _check_factors(self) -> None:
        wanted: dict[str, tuple[int, ...]] = {}
        for target in self.lora.targets:
            for kind, sizes in factor_shapes(target, self.config.shape, self.lora.rank).items():
                wanted[_key(PARTS[target][0], kind)] = (self.config.shape.num_layers, *sizes)
        found: Mapping[str, tuple[int, ...]] = {k: v[0] for k, v in self._factors.items()}
        for key in sorted(set(wanted) | set(found)):
            if wanted.get(key) != found.get(key):
                raise DamagedError(
                    f"{self.path}: {key}: stored as {found.get(key)}, its factors of rank "
                    f"{self.lora.rank} in {', '.join(self.lora.targets)} make {wanted.get(key)}; "
                    "copy it again"
                )

    def _factor(self, rest: str, kind: str, layer: int) -> Tensor:
        """A whole factor of one layer: of the linear that the weight ``rest`` lies in."""
        key = _key(rest, kind)
        (_, *sizes), chunks = self._factors[key]
        mine = [c for c in chunks if c.offsets[0] <= layer < c.offsets[0] + c.sizes[0]]
        if sum(prod(chunk.sizes[1:]) for chunk in mine) != prod(sizes):
            raise DamagedError(f"{self.path}: {key}: layer {layer} is not whole; copy it again")
        out = torch.empty(sizes, dtype=mine[0].dtype)
        for chunk in mine:
            place = [slice(at, at + n) for at, n in zip(chunk.offsets[1:], chunk.sizes[1:])]
            out[tuple(place)] = self._within(chunk, layer)
        return out

    def _factors_of(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A and B of a canonical weight, its own rows of B; None for one without factors."""
        layer, rest = split_layer(name)
        if layer is None or _TARGET_OF.get(rest) not in self.lora.targets:
            return None
        b = split(self._factor(rest, B, layer), rest, self.config.shape)
        return self._factor(rest, A, layer), b

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        factors = self._factors_of(name)
        if factors is None:
            return super().read(name, start, stop)
        a, b = factors
        dim = split_dim(axes_of(name))
        assert dim is not None, name
        axis = axes_of(name)[dim]
        size, rows = self.config.shape.size(axis), self.config.shape.rows(axis)
        stop = size if stop is None else stop
        # whole blocks, at the same places whatever is asked for: how a product rounds depends on
        # its sizes, and parts have to be those of the whole to the bit
        step = max(1, _BLOCK_ROWS // rows)
        parts = []
        for at in range(start // step * step, stop, step):
            upto = min(at + step, size)
            weight, here = super().read(name, at, upto), (at * rows, (upto - at) * rows)
            a_here = a if dim == 0 else a.narrow(1, *here).contiguous()
            b_here = b.narrow(0, *here).contiguous() if dim == 0 else b
            whole = merged(weight.contiguous(), a_here, b_here, self.lora)
            low, high = max(start - at, 0), min(stop, upto) - at
            parts.append(whole.narrow(dim, low * rows, (high - low) * rows))
        return torch.cat(parts, dim)


def _key(rest: str, kind: str) -> str:
    """Where a factor of the linear of a canonical weight is stored."""
    return f"{LAYER_PREFIX}{stored_name(rest).removesuffix('weight')}{kind}"
