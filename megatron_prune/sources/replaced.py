"""What a repair replaced: the record of it, and the model with the replaced tensors in place.

Pruning by itself only slices. A repair computes some tensors anew (`engine.repair`); they are
written into the checkpoint like all others, and ``repair.json`` beside its plan says which, how,
from what text, how much it helped, and the SHA-256 of each, so `verify` can hold them to it. The
record is a few kB per layer and travels wherever the plan does; the tensors are not kept twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import (
    FINAL_NORM,
    axes_of,
    names,
    norm_before,
    split_dim,
    split_layer,
)
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.source import DTYPES, Source
from megatron_prune.store.commit import write_file

VERSION = 1
STATISTICS = ("sequential", "dense")
TARGETS = ("own", "dense", "stream")
DAMPING = {"own": 0.01, "dense": 0.01, "stream": 0.1}  # by target
READERS_DAMPING = 0.01
PROJECTIONS = ("self_attention.linear_proj", "mlp.linear_fc2")
NORMS = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
_REPLACEABLE = {FINAL_NORM.name, *NORMS, *(f"{p}.weight" for p in PROJECTIONS)}
_REPLACEABLE |= {f"{p}.bias" for p in PROJECTIONS}
READERS = (
    *(f"self_attention.linear_{part}.weight" for part in "qkv"),
    *(f"mlp.linear_{part}.weight" for part in ("gate", "up")),
)
_REPLACEABLE |= {*READERS}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How weights are fitted by least squares.

    Attributes:
        target: what the fitted output should be. ``own``: what the layer with all its heads and
            channels makes of the same input. ``dense``: what the unpruned model's layer makes of
            its own. ``stream``: what brings the hidden state to the unpruned model's, errors of all
            layers before included, and what dropped layers would add next.
        readers: whether ``linear_qkv`` and ``linear_fc1`` are fitted too, so that they read from
            the kept channels what the unpruned model's norm would give them.
        damping, readers_damping: see `least_squares.fit`.
        statistics: ``sequential``, inputs as the repaired layers below make them, or ``dense``, as
            the unpruned model does.
    """

    target: str
    readers: bool
    damping: float
    readers_damping: float = READERS_DAMPING
    statistics: str = "sequential"

    def __post_init__(self) -> None:
        assert self.statistics in STATISTICS and self.target in TARGETS
        assert self.statistics == "sequential" or (self.target == "own" and not self.readers)

    @classmethod
    def for_plan(
        cls,
        plan: PrunePlan,
        *,
        target: str | None = None,
        readers: bool | None = None,
        damping: float | None = None,
        readers_damping: float = READERS_DAMPING,
        statistics: str = "sequential",
    ) -> Fit:
        """What is not given, as docs/score.md found it best: without its hidden channels or
        layers a model strays, and fitting each layer to itself does not bring it back."""
        strays = plan.kept.hidden is not None or plan.kept.layers is not None
        if target is None:
            target = "stream" if strays and statistics == "sequential" else "own"
        if readers is None:
            readers = target == "stream"
        return cls(
            target=target,
            readers=readers,
            damping=DAMPING[target] if damping is None else damping,
            readers_damping=readers_damping,
            statistics=statistics,
        )

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model runs beside the pruned one."""
        return self.statistics == "dense" or self.target != "own" or self.readers

    @property
    def moves_dense_first(self) -> bool:
        """Whether the dense hidden states pass a half before it is fitted."""
        return self.needs_dense and self.statistics != "dense" and self.target != "dense"

    def __str__(self) -> str:
        readers = f", readers too (damping {self.readers_damping:g})" if self.readers else ""
        return f"target {self.target} (damping {self.damping:g}){readers}"

    def fits(self, plan: PrunePlan) -> bool:
        """Whether there is anything to fit."""
        return drops_inputs(plan) or self.target != "own" or self.readers


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """One tensor that is not the planned slice of the source.

    Attributes:
        how: least-squares, readers, norm-of-readers, or norm-rescale.
        sha256: dtype name -> of the tensor's bytes in that dtype, row by row; so a checkpoint that
            was cast on the way out can be checked too.
        error_before, error_after: relative error of the projection's output on the calibration
            text, of the plain slice and of this tensor.
        ratio: of the norm's weight to the slice.
    """

    how: str
    sha256: Mapping[str, str]
    error_before: float | None = None
    error_after: float | None = None
    ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What was done to a pruned model, apart from slicing.

    Attributes:
        settings: data digest, tokens, options; JSON values.
        tensors: canonical name (layers as in the pruned model) -> what replaced it.
    """

    plan_digest: str
    source_digest: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Replaced]

    def to_json(self) -> str:
        """The file's text: one line per tensor."""
        top = {
            "version": VERSION,
            "plan_digest": self.plan_digest,
            "source_digest": self.source_digest,
            "settings": dict(self.settings),
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in top.items()]
        tensors = []
        for name, replaced in self.tensors.items():
            values = {k: v for k, v in asdict(replaced).items() if v is not None}
            tensors.append(f"  {json.dumps(name)}: {json.dumps(values)}")
        lines.append(' "tensors": {\n' + ",\n".join(tensors) + "\n }")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def load_repair(path: Path, plan: PrunePlan, target: ModelConfig) -> Repair:
    """Read the record of a model ``target`` that was pruned by ``plan``.

    Raises:
        DamagedError: not a record, one of another plan, or one that claims a tensor which no repair
            replaces.
    """
    try:
        values = json.loads(path.read_text())
        if values["version"] != VERSION:
            raise DamagedError(f"{path}: version {values['version']!r}; this reads {VERSION}")
        tensors = {name: _replaced(fields) for name, fields in values["tensors"].items()}
        repair = Repair(
            plan_digest=values["plan_digest"],
            source_digest=values["source_digest"],
            settings=dict(values["settings"]),
            tensors=tensors,
        )
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(f"{path}: not the record of a repair: {error}") from None
    if repair.plan_digest != plan.digest:
        raise DamagedError(f"{path}: is of another plan than the one given")
    replaceable = {name for name in names(target) if split_layer(name)[1] in _REPLACEABLE}
    for name in tensors:
        if name not in replaceable:
            raise DamagedError(f"{path}: claims {name}, which no repair replaces")
    return repair


def _replaced(values: Mapping[str, Any]) -> Replaced:
    """A tensor's line of the record; raises ValueError or TypeError."""
    found = Replaced(**values)
    digests = found.sha256
    if not isinstance(digests, dict) or not all(isinstance(x, str) for x in digests.values()):
        raise ValueError(f"sha256 is {digests!r:.60}; wanted a table of dtypes and digests")
    if not isinstance(found.how, str):
        raise ValueError(f"how is {found.how!r:.60}; wanted a word")
    for name in ("error_before", "error_after", "ratio"):
        if not isinstance(x := getattr(found, name), int | float | None) or isinstance(x, bool):
            raise ValueError(f"{name} is {x!r:.60}; wanted a number")
    return found


def digests(x: Tensor) -> dict[str, str]:
    """SHA-256 of a tensor's values in every dtype that a checkpoint can be written in."""
    return {name: digest(x.to(dtype)) for name, dtype in DTYPES.items()}


def digest(x: Tensor) -> str:
    """SHA-256 of a tensor's values as they lie, row by row."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().data).hexdigest()


class Tensors(Mapping[str, Tensor]):
    """Replaced tensors, kept in a directory that all ranks see: 40% of a model fits no rank's host.

    One writes, all read; the files are read slice by slice.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._names = directory, dict[str, None]()

    def put(self, name: str, x: Tensor, *, here: bool = True) -> None:
        """Add or replace a tensor; every rank says so, and the one with ``here`` writes it."""
        if here:
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


class RepairedSource(Source):
    """A pruned model with some of its tensors replaced; everything else is read through."""

    def __init__(self, source: Source, replaced: Tensors) -> None:
        self.path, self.format, self.grid = source.path, source.format, source.grid
        self.companion_files, self.iteration = source.companion_files, source.iteration
        self.config = source.config
        self._source, self._replaced = source, replaced

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

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

    def close(self) -> None:
        self._source.close()


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


class MixedSource(Source):
    """A pruned model whose readers of some norms take mixtures of the hidden channels.

    Args:
        wide: the same pruned model with all hidden channels.
        mixes: by norm.
    """

    def __init__(self, pruned: Source, wide: Source, mixes: Mapping[str, Mix]) -> None:
        self.path, self.format, self.grid = pruned.path, pruned.format, pruned.grid
        self.companion_files, self.iteration = pruned.companion_files, pruned.iteration
        self.config = pruned.config
        self._pruned, self._wide, self._mixes = pruned, wide, mixes

    def dtype(self, name: str) -> torch.dtype:
        return self._pruned.dtype(name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        if name in self._mixes:
            return self._mixes[name].norm_K.cpu()
        norm = norm_before(name)
        if norm is None or norm not in self._mixes:
            return self._pruned.read(name, start, stop)
        readers, x = self._mixes[norm].readers_DK, self._wide.read(name, start, stop)
        return (x.to(readers.device).float() @ readers).to(x.dtype).cpu()

    def close(self) -> None:
        self._pruned.close()


def drops_inputs(plan: PrunePlan) -> bool:
    """Whether projections lose inputs by a plan."""
    kept = plan.kept
    return any(axis is not None for axis in (kept.heads, kept.query_groups, kept.ffn))


def without_units(plan: PrunePlan) -> PrunePlan:
    """The plan's layers and hidden channels alone: heads, groups, FFN and vocabulary whole."""
    kept = replace(plan.kept, heads=None, query_groups=None, ffn=None, vocab=None)
    return replace(plan, kept=kept)


def with_all_channels(plan: PrunePlan) -> PrunePlan:
    """The plan with all hidden channels."""
    return replace(plan, kept=replace(plan.kept, hidden=None))
