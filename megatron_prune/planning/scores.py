"""Scores of a model's prunable units, as a file: observed once, decided on often.

One safetensors file holds, for every criterion and axis, one number a unit (higher means keep), the
small statistics they came from, and in its header where they came from: the model's digest, the
data's, tokens, layout. One calibration serves many targets, and ranks never score for themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_prune.errors import DamagedError, PlanError
from megatron_prune.files.contents import no_safetensors
from megatron_prune.files.parsing import check_header, checked_as, parse_json
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, SCORED_AXES, ModelShape

Criterion = Callable[[str, int, int | None, int], Tensor]
"""(axis letter, its size, source layer or None for a model-wide axis, seed) -> [size] scores."""
Terms = Callable[[str, int, int | None], list[tuple[float, Tensor]]]
"""(axis letter, its size, layer as above) -> weights and [size] scores; `combined` is the whole."""

AXIS_WORDS = {axis: AXES[axis].word.replace("_", "-") for axis in SCORED_AXES}
_VERSION = "1"
_KEY = "megatron_prune.scores"
_STATISTICS = "statistics"
_MOST_HEADER = 1 << 20  # bytes; all criteria on all axes take some thousands


def score_shape(axis: str, shape: ModelShape) -> tuple[int, ...]:
    """Shape of the scores of an axis: [D], [L], or [L, n] for the axes chosen layer by layer."""
    if not AXES[axis].is_per_layer:
        return (shape.size(axis),)
    return (shape.num_layers, shape.size(axis))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What was found out about one model.

    Attributes:
        shape: of the model that was scored.
        source_digest: which model (`digest.source_digest`).
        criteria: name -> axis letter (of SCORED_AXES) -> float32, shaped as `score_shape` says.
        statistics: name -> float32; ``norm_energy`` [2 L + 1, D] is the mean square of every norm's
            normalised input before its weight (input and pre-MLP norm of each layer, then the final
            one): 1 on average over D.
        provenance: data digest, tokens, samples, sequence length, layout, as JSON values.
    """

    shape: ModelShape
    source_digest: str
    criteria: Mapping[str, Mapping[str, Tensor]]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, axes in self.criteria.items():
            for axis, x in axes.items():
                if axis not in AXIS_WORDS:
                    raise DamagedError(f"scores {name} of axis {axis!r}, which no model has")
                wanted = score_shape(axis, self.shape)
                if tuple(x.shape) != wanted:
                    raise DamagedError(
                        f"scores {name} of axis {axis} are {tuple(x.shape)}, the model wants "
                        f"{wanted}; score again"
                    )

    def criterion(self, expression: str) -> Criterion:
        """What planning asks for its scores.

        Args:
            expression: a name; a composite, weighted ranks (``activation+2*wanda``, ``-1*wanda``);
                or one of these for each axis (``hidden=residual-energy,heads=wanda,ffn=wanda``).

        Raises:
            PlanError: not an expression, or a criterion the file does not hold; when called, an
                axis that is not scored: says which criteria do.
        """
        terms = self.terms(expression)
        return lambda axis, size, layer, seed: combined(terms(axis, size, layer))

    def terms(self, expression: str) -> Terms:
        """What the scores of an expression are made of; see `criterion`."""
        by_axis = {axis: self._parsed(text) for axis, text in _by_axis(expression).items()}

        def found(axis: str, size: int, layer: int | None) -> list[tuple[float, Tensor]]:
            terms = by_axis.get(axis, by_axis.get(""))
            if terms is None:
                raise PlanError(
                    f"--criterion {expression}: says nothing of {AXIS_WORDS[axis]}; add "
                    f"{AXIS_WORDS[axis]}=NAME ({self._scoring(axis)})"
                )
            return [(weight, self._scores(name, axis, size, layer)) for weight, name in terms]

        return found

    def _parsed(self, text: str) -> list[tuple[float, str]]:
        terms = _terms(text)
        for _, name in terms:
            if name not in self.criteria:
                raise PlanError(
                    f"--criterion {name}: not in the scores, which hold "
                    f"{', '.join(sorted(self.criteria))}"
                )
        return terms

    def _scoring(self, axis: str) -> str:
        enough = {axis, "Q"} if axis == "K" else {axis}  # a group is scored by its heads
        have = sorted(name for name, axes in self.criteria.items() if enough & set(axes))
        return f"those in the file that do: {', '.join(have) or 'none'}"

    def _scores(self, name: str, axis: str, size: int, layer: int | None) -> Tensor:
        held = self.criteria[name]
        if axis not in held and axis == "K" and "Q" in held:
            assert layer is not None
            heads = held["Q"][layer].double().view(size, -1)
            return heads.square().sum(1).sqrt()  # a group is as good as its heads together
        if axis not in held:
            raise PlanError(
                f"--criterion {name} does not score {AXIS_WORDS[axis]}; {self._scoring(axis)}"
            )
        x = held[axis] if layer is None or not AXES[axis].is_per_layer else held[axis][layer]
        assert x.numel() == size, (axis, x.shape, size)
        return x.double()


def criteria_named(expression: str) -> dict[str, tuple[str, ...]]:
    """Axis letter -> the criteria that an expression decides by along it, in the order they stand;
    axes it says nothing of are left out.

    Raises:
        PlanError: not an expression.
    """
    by_axis = _by_axis(expression)
    parts = {axis: by_axis.get(axis, by_axis.get("")) for axis in SCORED_AXES}
    return {
        axis: tuple(dict.fromkeys(name for _, name in _terms(text)))
        for axis, text in parts.items()
        if text is not None
    }


def criteria_in(text: str) -> tuple[str, ...]:
    """The criteria that an expression, or a list of expressions for all axes, names; each once.

    Raises:
        PlanError: none of both.
    """
    by_axis = "=" in text
    named = (
        criteria_named(text).values()
        if by_axis
        else [[n for _, n in _terms(part)] for part in text.split(",")]
    )
    return tuple(dict.fromkeys(name for names in named for name in names if name))


def narrowed(expression: str, axes: str) -> str:
    """What an expression says of some axes, as an expression that says nothing of others."""
    by_axis = _by_axis(expression)
    return ",".join(f"{AXIS_WORDS[axis]}={by_axis.get(axis) or by_axis['']}" for axis in axes)


def _terms(text: str) -> list[tuple[float, str]]:
    """``a+2*b`` -> weights and names."""
    terms = []
    for term in text.split("+"):
        weight, _, name = term.rpartition("*")
        try:
            terms.append((float(weight or 1), name.strip()))
            if not math.isfinite(terms[-1][0]):
                raise ValueError
        except ValueError:
            raise PlanError(f"--criterion {text}: {weight!r} is not a weight") from None
    return terms


def _by_axis(expression: str) -> dict[str, str]:
    """Axis letter -> its part of an expression; "" -> the part for all axes."""
    parts: dict[str, str] = {}
    letters = {word: letter for letter, word in AXIS_WORDS.items()}
    for part in expression.split(","):
        word, equals, text = part.strip().rpartition("=")
        if (equals and word not in letters) or not text:
            raise PlanError(
                f"--criterion {expression}: {part.strip()!r}; wanted NAME or AXIS=NAME, axes are "
                f"{', '.join(letters)}"
            )
        letter = letters.get(word, "")
        if letter in parts:
            raise PlanError(
                f"--criterion {expression}: {word or 'all axes'} twice, {parts[letter]} and "
                f"{text}; wanted one, or both as {parts[letter]}+{text}, or AXIS=NAME for an axis"
            )
        parts[letter] = text
    return parts


def is_plain(terms: list[tuple[float, Tensor]]) -> bool:
    """Whether an expression is one criterion as it is, rather than ranks."""
    return len(terms) == 1 and terms[0][0] == 1


def combined(terms: list[tuple[float, Tensor]]) -> Tensor:
    """[n] one term's own scores, or the sum of several ones' ranks, each times its weight."""
    if is_plain(terms):
        return terms[0][1]
    return torch.stack([weight * _ranks(x) for weight, x in terms]).sum(0)


def _ranks(x: Tensor) -> Tensor:
    """0 for the lowest to 1 for the highest, float64; equal values by index, the lower one above
    (as selection prefers it)."""
    order = torch.sort(x, descending=True, stable=True).indices
    ranks = torch.empty(len(x), dtype=torch.float64)
    ranks[order] = torch.linspace(1, 0, len(x), dtype=torch.float64)
    return ranks


def scores_bytes(scores: Scores) -> bytes:
    """The file's bytes."""
    tensors = {
        f"{name}.{axis}": x.float().contiguous()
        for name, axes in scores.criteria.items()
        for axis, x in axes.items()
    }
    tensors |= {f"{_STATISTICS}.{n}": x.float().contiguous() for n, x in scores.statistics.items()}
    header = {
        "version": _VERSION,
        "shape": scores.shape.as_dict(),
        "source_digest": scores.source_digest,
        "provenance": dict(scores.provenance),
    }
    from safetensors.torch import save

    return save(tensors, metadata={_KEY: json.dumps(header, sort_keys=True)})


def load_scores(path: Path) -> Scores:
    """Read a scores file.

    Raises:
        PlanError: missing, or another kind of file.
        DamagedError: its parts cannot be read, or contradict each other.
    """
    made = "make it with `megatron-prune score`"
    if not path.is_file():
        found = "is a directory" if path.is_dir() else "is not there"
        raise PlanError(f"--scores {path}: {found}; {made}")
    if what := no_safetensors(path):
        raise PlanError(f"{path}: not a scores file: {what}; {made}")
    with checked_as(DamagedError, path, "not a scores file"):
        check_header(path, _MOST_HEADER)
        try:
            with safe_open(path, framework="pt") as file:
                told = (file.metadata() or {}).get(_KEY)
                names = [] if told is None else file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(error) from None
    if told is None:
        raise PlanError(
            f"{path}: not a scores file: it holds other tensors, such as weights; {made}"
        )
    with checked_as(DamagedError, path, "not a scores file"):
        header = parse_json(told)
        if header["version"] != _VERSION:
            raise DamagedError(f"version {header['version']!r}; this reads {_VERSION}")
        criteria: dict[str, dict[str, Tensor]] = {}
        statistics: dict[str, Tensor] = {}
        for key, x in tensors.items():
            name, _, last = key.rpartition(".")
            if name == _STATISTICS:
                statistics[last] = x
            else:
                criteria.setdefault(name, {})[last] = x
            if x.dtype != torch.float32:
                raise DamagedError(f"{key} is {x.dtype}; wanted float32, score again")
            if not bool(torch.isfinite(x).all()):
                raise DamagedError(f"{key} holds values that are not finite; score again")
        return Scores(
            shape=ModelShape.from_dict(header["shape"]),
            source_digest=str(header["source_digest"]),
            criteria=criteria,
            statistics=statistics,
            provenance=dict(header["provenance"]),
        )
