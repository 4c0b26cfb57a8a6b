"""What a report is made of: files, recognised by what they hold and checked to belong together.

A scores file (safetensors whose header says so), plans (JSON with ``kept``) and what a budget
search tried (JSON with a list ``candidates``). A further kind is one more case in `_read`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.plan import PrunePlan, load_plan
from megatron_prune.scores import Scores, load_scores
from megatron_prune.shape import ModelShape
from megatron_prune.store.commit import hash_file

WANTED = "wanted scores (safetensors), a plan (JSON) or a budget search's candidates (JSON)"
SIZES = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One shape that a budget search tried.

    Attributes:
        sizes: in the order of `SIZES`.
        proxy, loss: lower is better; loss where it was measured.
        costs: by the budgets' names.
    """

    sizes: tuple[int, ...]
    parameters: int
    proxy: float
    loss: float | None
    costs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Search:
    """What a budget search tried, and what else its file says (target, proxy's name, ...)."""

    candidates: tuple[Candidate, ...]
    facts: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of the command line, for the page's header."""

    label: str
    kind: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a page shows. Plans and searches are under their labels, in the order given."""

    files: tuple[InputFile, ...]
    scores: Scores | None = None
    plans: Mapping[str, PrunePlan] = field(default_factory=dict)
    searches: Mapping[str, Search] = field(default_factory=dict)

    @property
    def source_digest(self) -> str | None:
        """The model that scores and plans are about; None when there is neither."""
        digests = [x.source_digest for x in (self.scores, *self.plans.values()) if x is not None]
        return digests[0] if digests else None

    @property
    def source(self) -> ModelShape | None:
        """The shape of that model."""
        shapes = [plan.source for plan in self.plans.values()]
        return self.scores.shape if self.scores is not None else next(iter(shapes), None)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Read and recognise every file, and check that they are about one model.

    Raises:
        ConfigError: a file that is missing or of no known kind, or a second scores file.
        PlanError: a plan that contradicts itself, or was made for another model.
        DamagedError: a scores file that cannot be read.
    """
    scores: dict[str, Scores] = {}
    plans: dict[str, PrunePlan] = {}
    searches: dict[str, Search] = {}
    files = []
    for path, label in zip(paths, _labels(paths)):
        found = _read(path)
        if isinstance(found, Scores):
            scores[label], kind = found, "scores"
        elif isinstance(found, PrunePlan):
            plans[label], kind = found, "plan"
        else:
            searches[label], kind = found, "budget search"
        files.append(InputFile(label=label, kind=kind, sha256=hash_file(path).sha256))
    if len(scores) > 1:
        raise ConfigError(
            f"{' and '.join(scores)}: {len(scores)} scores files; a page shows one, make one each"
        )
    _check_one_model(scores, plans, searches)
    return Inputs(
        files=tuple(files),
        scores=next(iter(scores.values()), None),
        plans=plans,
        searches=searches,
    )


def _labels(paths: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two files have one name."""
    names = [path.name for path in paths]
    labels = [str(p) if names.count(p.name) > 1 else p.name for p in paths]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label}: stands twice; name each file once")
    return labels


def _read(path: Path) -> Scores | PrunePlan | Search:
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "is not there"
        raise ConfigError(f"{path}: {what}; {WANTED}")
    if _is_safetensors(path):
        return load_scores(path)
    try:
        values = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise ConfigError(f"{path}: neither safetensors nor JSON; {WANTED}") from None
    if isinstance(values, dict) and "kept" in values:
        return load_plan(path)
    if isinstance(values, dict) and isinstance(values.get("candidates"), list):
        return _search(path, values)
    keys = ", ".join(sorted(map(str, values))[:8]) if isinstance(values, dict) else ""
    found = f"a table of {keys or 'nothing'}" if isinstance(values, dict) else type(values).__name__
    raise ConfigError(f"{path}: JSON that holds {found}; {WANTED}")


def _is_safetensors(path: Path) -> bool:
    """8 bytes say how long the header is that follows; JSON text there would be petabytes."""
    with open(path, "rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _search(path: Path, values: Mapping[str, Any]) -> Search:
    candidates = []
    for number, row in enumerate(values["candidates"]):
        where = f"{path}: candidates[{number}]"
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: found {row!r:.60}; wanted a table of {', '.join(SIZES)}")
        loss, costs = row.get("loss"), row.get("costs", {})
        if not isinstance(costs, dict):
            raise ConfigError(f"{where}: costs is {costs!r:.60}; wanted a table of numbers")
        candidates.append(
            Candidate(
                sizes=tuple(int(_number(where, row, name, whole=True)) for name in SIZES),
                parameters=int(_number(where, row, "parameters", whole=True)),
                proxy=_number(where, row, "proxy"),
                loss=None if loss is None else _number(where, row, "loss"),
                costs={str(name): _number(where, costs, name) for name in costs},
            )
        )
    facts = {str(key): value for key, value in values.items() if key != "candidates"}
    return Search(candidates=tuple(candidates), facts=facts)


def _number(where: str, row: Mapping[str, Any], name: str, *, whole: bool = False) -> float:
    value: Any = row.get(name)
    known = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not known or not math.isfinite(value):
        wanted = "a whole number" if whole else "a finite number"
        raise ConfigError(f"{where}: {name} is {value!r}; wanted {wanted}")
    return value


def _check_one_model(
    scores: Mapping[str, Scores], plans: Mapping[str, PrunePlan], searches: Mapping[str, Search]
) -> None:
    """Digests tell models apart; shapes are compared too, for a search, which has no digest, and
    for a file edited by hand."""
    facts = {label: (x.source_digest, x.shape.as_dict()) for label, x in scores.items()}
    facts |= {label: (plan.source_digest, plan.source.as_dict()) for label, plan in plans.items()}
    for first, label in pairwise(facts):
        if facts[label][0] != facts[first][0]:
            raise PlanError(
                f"{label} is about model {facts[label][0][:16]}, {first} about model "
                f"{facts[first][0][:16]} (source_digest); give files of one model"
            )
    shapes = {label: shape for label, (_, shape) in facts.items()}
    shapes |= {n: x.facts["source"] for n, x in searches.items() if "source" in x.facts}
    for first, label in pairwise(shapes):
        if shapes[label] != shapes[first]:
            raise PlanError(
                f"{label} is about a model of {shapes[label]}, {first} about one of "
                f"{shapes[first]}; give files of one model"
            )
