"""The plan: which indices of which axes are kept, as a file one can read, diff and sign off.

A plan is made once, from scores; ranks read it and never draw their own masks. Indices are sorted
and in the source's numbering. An axis that is not pruned is None (``null`` in the file).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_prune.errors import PlanError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, Axis, ModelShape
from megatron_prune.parsing import checked_as, read_json

VERSION = 1
PRUNE_TYPES = ("balance", "unbalance")
PerLayer = Mapping[int, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Kept indices by the words of `AXES`, in the order of the file; those of an axis that is kept
    per layer map a kept source layer to its own."""

    layers: tuple[int, ...] | None = None
    hidden: tuple[int, ...] | None = None
    heads: PerLayer | None = None
    query_groups: PerLayer | None = None
    ffn: PerLayer | None = None
    vocab: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class PrunePlan:
    """A decision about one model.

    Attributes:
        source: the shape of the model it was made for; ``source_digest`` tells which model.
        balance_for: TP size at which every rank keeps equally many of each split axis.
        uniform: every layer keeps equally many; without it layers may differ in FFN channels.

    Raises:
        PlanError: indices unsorted, out of range, unequal between layers of a uniform plan, or
            heads outside kept groups; a prune_type or balance_for that does not exist.
        ShapeError: the source's own layers differ.
    """

    source: ModelShape
    kept: Kept
    criterion: str
    seed: int
    prune_type: str
    balance_for: int
    source_digest: str
    uniform: bool = True

    def __post_init__(self) -> None:
        kept, shape = self.kept, self.source
        shape.check_uniform("plan", "prune its source anew")
        if self.prune_type not in PRUNE_TYPES:
            raise PlanError(f"prune_type {self.prune_type!r}; wanted {' or '.join(PRUNE_TYPES)}")
        if self.balance_for < 1:
            raise PlanError(f"balance_for {self.balance_for}; wanted 1 or more")
        for letter, axis in AXES.items():
            if not axis.is_per_layer:
                indices = getattr(kept, axis.word, None)
                _check_indices(f"kept.{axis.word}", indices, shape.size(letter))
        for letter, axis in AXES.items():
            if axis.is_per_layer and (per_layer := getattr(kept, axis.word)) is not None:
                self._check_per_layer(axis.word, per_layer, shape.size(letter))
        for layer in self.layers:
            self._check_heads(layer)
        _ = self.target  # a target that is no shape is refused here

    def _check_per_layer(self, name: str, per_layer: PerLayer, size: int) -> None:
        if sorted(per_layer) != list(self.layers):
            raise PlanError(
                f"kept.{name}: has layers {sorted(per_layer)}, the plan keeps {list(self.layers)}"
            )
        for layer, indices in per_layer.items():
            _check_indices(f"kept.{name}[{layer}]", indices, size)
        counts = {len(indices) for indices in per_layer.values()}
        if len(counts) > 1 and (self.uniform or name != "ffn"):
            raise PlanError(
                f"kept.{name}: layers keep {sorted(counts)}; wanted equally many in every layer"
            )

    def _check_heads(self, layer: int) -> None:
        if self.kept.heads is None and self.kept.query_groups is None:
            return
        groups, per_group = self.indices("K", layer), self.source.heads_per_group
        counts = dict.fromkeys(groups, 0)
        for head in self.indices("Q", layer):
            if head // per_group not in counts:
                raise PlanError(
                    f"layer {layer}: head {head} is kept, its query group {head // per_group} "
                    f"is not; kept groups are {list(groups)}"
                )
            counts[head // per_group] += 1
        if len(set(counts.values())) > 1:
            raise PlanError(
                f"layer {layer}: groups keep {counts} heads; wanted equally many in every group"
            )

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Source numbers of the kept layers."""
        kept = self.kept.layers
        return tuple(range(self.source.num_layers)) if kept is None else kept

    def indices(self, axis: str, layer: int | None = None) -> Sequence[int]:
        """Kept source indices of an axis, of a source layer where the axis is per layer."""
        kept = getattr(self.kept, AXES[axis].word, None)  # no plan cuts the channels of a head
        if kept is None:
            return range(self.source.size(axis))
        assert layer is not None or not AXES[axis].is_per_layer, f"axis {axis} is kept per layer"
        indices: Sequence[int] = kept[layer] if AXES[axis].is_per_layer else kept
        return indices

    def tensor(self, axis: str, layer: int | None = None) -> Tensor | None:
        """`indices` as [n] int64, None where the axis is kept whole."""
        indices = self.indices(axis, layer)
        return None if isinstance(indices, range) else torch.tensor(indices, dtype=torch.int64)

    @cached_property
    def target(self) -> ModelShape:
        """The shape of the pruned model."""
        layer = self.layers[0]
        widths = tuple(len(self.indices("F", n)) for n in self.layers)
        return replace(
            self.source,
            num_layers=len(self.layers),
            hidden_size=len(self.indices("D")),
            ffn_hidden_size=max(widths),
            ffn_per_layer=widths if len(set(widths)) > 1 else None,
            num_attention_heads=len(self.indices("Q", layer)),
            num_query_groups=len(self.indices("K", layer)),
            vocab_size=len(self.indices("V")),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the plan's text, which names this decision in manifests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """The file's text; the same plan always gives the same bytes."""

        def plain(kept: PerLayer | tuple[int, ...] | None) -> Any:
            if isinstance(kept, Mapping):
                return {str(k): list(kept[k]) for k in sorted(kept)}
            return None if kept is None else list(kept)

        values = {
            "version": VERSION,
            "source": self.source.as_dict(),
            "target": self.target.as_dict(),
            "criterion": self.criterion,
            "seed": self.seed,
            "prune_type": self.prune_type,
            "balance_for": self.balance_for,
            "source_digest": self.source_digest,
            **({} if self.uniform else {"uniform": False}),
            "kept": {field.name: plain(getattr(self.kept, field.name)) for field in fields(Kept)},
        }
        top = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in values.items()]
        top[-1] = ' "kept": ' + _kept_lines(values["kept"])
        return "{\n" + ",\n".join(top) + "\n}\n"


def compose(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    """One plan that does what ``first`` and then ``second`` do, in the numbers of the first source.

    Takes criterion and seed of ``second``. Balanced only for what both are: as many on each of n
    ranks, of which as many on each are kept.

    Raises:
        PlanError: ``second`` was not made for a model of the shape that ``first`` leaves.
    """
    if second.source != first.target:
        raise PlanError(
            f"the first plan leaves {first.target.as_dict()}, the second was made for "
            f"{second.source.as_dict()}; plan the second on what the first leaves"
        )

    def indices(letter: str, old: int | None, new: int | None) -> tuple[int, ...]:
        units = first.indices(letter, old)
        return tuple(units[i] for i in second.indices(letter, new))

    kept: dict[str, Any] = {}
    for letter, axis in AXES.items():
        if all(getattr(plan.kept, axis.word, None) is None for plan in (first, second)):
            continue
        kept[axis.word] = (
            {first.layers[new]: indices(letter, first.layers[new], new) for new in second.layers}
            if axis.is_per_layer
            else indices(letter, None, None)
        )
    is_balanced = first.prune_type == second.prune_type == "balance"
    return PrunePlan(
        source=first.source,
        kept=Kept(**kept),
        criterion=second.criterion,
        seed=second.seed,
        prune_type="balance" if is_balanced else "unbalance",
        balance_for=math.gcd(first.balance_for, second.balance_for),
        source_digest=first.source_digest,
        uniform=first.uniform and second.uniform,
    )


def _kept_lines(kept: Any) -> str:
    """One line per axis and layer, so that a diff of two plans is readable."""
    lines = []
    for axis, value in kept.items():
        if isinstance(value, dict):
            inner = [f"   {json.dumps(layer)}: {json.dumps(x)}" for layer, x in value.items()]
            lines.append(f"  {json.dumps(axis)}: {{\n" + ",\n".join(inner) + "\n  }")
        else:
            lines.append(f"  {json.dumps(axis)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n }"


def _check_indices(where: str, indices: Sequence[int] | None, size: int) -> None:
    if indices is None:
        return
    if not indices:
        raise PlanError(f"{where}: keeps nothing; keep at least one")
    if any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise PlanError(f"{where}: holds something other than integers")
    if indices[0] < 0 or max(indices) >= size:
        raise PlanError(f"{where}: holds {max(indices)} and {indices[0]}; wanted 0 to {size - 1}")
    if any(a >= b for a, b in pairwise(indices)):
        raise PlanError(f"{where}: not sorted, or an index stands twice")


def load_plan(path: Path) -> PrunePlan:
    """Read a plan file.

    Raises:
        PlanError: missing, not a plan, another version, or a plan that contradicts itself.
    """
    values = read_json(path, PlanError, flag="--plan", unique=True)
    with checked_as(PlanError, f"--plan {path}", "not a plan"):
        return plan_from_dict(values)


def plan_from_dict(values: Mapping[str, Any]) -> PrunePlan:
    """A plan from the parsed file; `load_plan` turns what goes wrong into PlanError."""
    if values["version"] != VERSION:
        raise PlanError(f"version {values['version']!r}; this reads version {VERSION}")
    kept, uniform = values["kept"], values.get("uniform", True)
    if not isinstance(uniform, bool):
        raise PlanError(f"uniform is {uniform!r}; wanted true or false")

    def of_file(axis: Axis) -> Any:
        if kept[axis.word] is None or not axis.is_per_layer:
            return None if kept[axis.word] is None else tuple(kept[axis.word])
        return {int(layer): tuple(indices) for layer, indices in kept[axis.word].items()}

    names = {field.name for field in fields(Kept)}
    plan = PrunePlan(
        source=ModelShape.from_dict(values["source"]),
        kept=Kept(**{axis.word: of_file(axis) for axis in AXES.values() if axis.word in names}),
        criterion=str(values["criterion"]),
        seed=int(values["seed"]),
        prune_type=str(values["prune_type"]),
        balance_for=int(values["balance_for"]),
        source_digest=str(values["source_digest"]),
        uniform=uniform,
    )
    if plan.target.as_dict() != values["target"]:
        raise PlanError(f"target says {values['target']}, its indices give {plan.target.as_dict()}")
    return plan
