"""What a report is made of: files, recognised by what they hold and checked to belong together.

A scores file (safetensors whose header says so), plans (JSON with ``kept``), what a budget search
tried (JSON with a list ``candidates``), training runs (directories with ``metrics.jsonl``) and what
``evaluate`` made of models (JSON), and records of zeros (``sparsity.json``, or a model that carries
one). A run of ``shear`` brings its plan and its gates with it. A further kind is one more case in
`_read`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_prune.errors import CheckpointError, ConfigError, PlanError
from megatron_prune.files import hash_file
from megatron_prune.files.parsing import read_json
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.planning.scores import Scores, load_scores
from megatron_prune.report.judged import is_judgement, is_task_results
from megatron_prune.report.masks import learned_files
from megatron_prune.report.runs import METRICS, Run, is_run, read_run
from megatron_prune.shearing.words import MASK_SCORES
from megatron_prune.sources.source import SPARSITY
from megatron_prune.sources.sparsity_record import Sparsity, load_sparsity
from megatron_prune.store.open import iteration_directory
from megatron_prune.store.passenger import COMPANIONS, PLAN

WANTED = (
    "wanted scores (safetensors), a plan (JSON), a budget search's candidates (JSON), a run (its "
    f"directory or {METRICS}), a result of evaluate (JSON) or a sparse model (its directory or "
    f"{SPARSITY})"
)
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
class Judged:
    """What ``evaluate`` wrote.

    Attributes:
        kind: text, or tasks of lm-evaluation-harness.
    """

    kind: str
    values: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """One file of the command line, for the page's header."""

    label: str
    kind: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a page shows. Plans and searches are under their labels, in the order given.

    Attributes:
        plans: those given, and those that the runs of ``shear`` came to, under the runs' labels,
            where they are about the same model.
        learned, gates: what the runs of ``shear`` brought with them, of whatever models.
    """

    files: tuple[InputFile, ...]
    scores: Scores | None = None
    plans: Mapping[str, PrunePlan] = field(default_factory=dict)
    searches: Mapping[str, Search] = field(default_factory=dict)
    runs: Mapping[str, Run] = field(default_factory=dict)
    judgements: Mapping[str, Judged] = field(default_factory=dict)
    results: Mapping[str, Judged] = field(default_factory=dict)
    sparse: Mapping[str, Sparsity] = field(default_factory=dict)
    learned: Mapping[str, PrunePlan] = field(default_factory=dict)
    gates: Mapping[str, Scores] = field(default_factory=dict)

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


Found = Scores | PrunePlan | Search | Run | Judged | Sparsity


def split_name(text: str) -> tuple[str | None, Path]:
    """``NAME=PATH`` as a name and a path; a path that is there is one, whatever is in it."""
    name, equals, rest = text.partition("=")
    if Path(text).exists() or not equals or not name or not rest:
        return None, Path(text)
    return name, Path(rest)


def read_inputs(paths: Sequence[Path], names: Sequence[str | None] | None = None) -> Inputs:
    """Read and recognise every file, and check that they are about one model.

    Args:
        names: what to call each; None for its own name.

    Raises:
        ConfigError: a file that is missing or of no known kind, or a second scores file.
        PlanError: a plan that contradicts itself, or was made for another model; a run's plan and
            gates that are about two.
        DamagedError: a scores file or a record of zeros that cannot be read.
    """
    found: dict[str, Found] = {}
    files, sparse = [], dict[str, Sparsity]()
    learned, gates = dict[str, PrunePlan](), dict[str, Scores]()
    for path, label in zip(paths, _labels(paths, names or [None] * len(paths))):
        for one, file in _read_all(path, _record_in(path)):
            files.append(InputFile(label=label, kind=_kind(one), sha256=hash_file(file).sha256))
            if isinstance(one, Sparsity):
                sparse[label] = one
            elif isinstance(one, PrunePlan) and file != path:
                learned[label] = one
            elif isinstance(one, Scores) and file != path:
                gates[label] = one
            else:
                found[label] = one
    scores = {label: x for label, x in found.items() if isinstance(x, Scores)}
    plans = {label: x for label, x in found.items() if isinstance(x, PrunePlan)}
    searches = {label: x for label, x in found.items() if isinstance(x, Search)}
    judged = {label: x for label, x in found.items() if isinstance(x, Judged)}
    if len(scores) > 1:
        raise ConfigError(
            f"{' and '.join(scores)}: {len(scores)} scores files; a page shows one, make one each"
        )
    _check_one_model(scores, plans, searches)
    for label in gates.keys() & learned.keys():
        pair = f"{label}: {MASK_SCORES}", f"{label}: {PLAN}"
        _check_one_model({pair[0]: gates[label]}, {pair[1]: learned[label]}, {})
    return Inputs(
        files=tuple(files),
        scores=next(iter(scores.values()), None),
        plans=_joined(scores, plans, searches, learned),
        searches=searches,
        runs={label: x for label, x in found.items() if isinstance(x, Run)},
        judgements={label: x for label, x in judged.items() if x.kind == "text"},
        results={label: x for label, x in judged.items() if x.kind == "tasks"},
        sparse=sparse,
        learned=learned,
        gates=gates,
    )


def _record_in(path: Path) -> Path | None:
    """The record of zeros that the model, or the newest checkpoint of the run, in a directory
    carries."""
    if not path.is_dir():
        return None
    try:
        directory = iteration_directory(path)
    except CheckpointError:  # a run that has no checkpoint yet
        return None
    places = (directory / SPARSITY, directory / COMPANIONS / SPARSITY)
    return next((place for place in places if place.is_file()), None)


def _read_all(path: Path, carried: Path | None) -> Iterator[tuple[Found, Path]]:
    """What a path holds, and the file that it was read from: a run may carry a record of zeros, a
    plan and gates too."""
    if carried is not None:
        yield load_sparsity(carried), carried
    if carried is None or is_run(path):
        one = _read(path)
        yield one, one.path if isinstance(one, Run) else path
        for file in learned_files(one) if isinstance(one, Run) and path.is_dir() else ():
            yield load_plan(file) if file.name == PLAN else load_scores(file), file


def _kind(found: Found) -> str:
    kinds = {
        Scores: "scores", PrunePlan: "plan", Search: "budget search", Run: "training run",
        Sparsity: "record of zeros",
    }  # fmt: skip
    return f"judged on {found.kind}" if isinstance(found, Judged) else kinds[type(found)]


def _labels(paths: Sequence[Path], names: Sequence[str | None]) -> list[str]:
    """The names given; else those of files, a run's of its directory, or whole paths where two
    have one name."""
    of_directory = (METRICS, SPARSITY)
    own = [(p.parent.name if p.name in of_directory else p.name) or str(p) for p in paths]
    labels = [
        name or (str(p) if own.count(mine) > 1 else mine)
        for name, p, mine in zip(names, paths, own)
    ]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label}: stands twice; name each file once")
    return labels


def _read(path: Path) -> Found:
    if is_run(path):
        return read_run(path)
    if not path.is_file():
        what = f"is a directory without {SPARSITY}" if path.is_dir() else "is not there"
        raise ConfigError(f"{path}: {what}; {WANTED}")
    if _is_safetensors(path):
        return load_scores(path)
    values = read_json(path, ConfigError, "neither safetensors nor JSON", advice=f"; {WANTED}")
    if isinstance(values, dict) and "kept" in values:
        return load_plan(path)
    if isinstance(values, dict) and {"method", "source_digest", "tensors"} <= values.keys():
        return load_sparsity(path)
    if isinstance(values, dict) and isinstance(values.get("candidates"), list):
        return _search(path, values)
    if isinstance(values, dict) and is_judgement(values):
        return Judged(kind="text", values=values)
    if isinstance(values, dict) and is_task_results(values):
        return Judged(kind="tasks", values=values)
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


def _joined(
    scores: Mapping[str, Scores],
    plans: Mapping[str, PrunePlan],
    searches: Mapping[str, Search],
    learned: Mapping[str, PrunePlan],
) -> dict[str, PrunePlan]:
    """The plans, and those that runs came to: not one that was given by itself as well, and none
    of another model, so that runs of different models still stand on one page."""
    joined = dict(plans)
    given = {plan.digest for plan in plans.values()}
    for label, plan in learned.items():
        with_it = {**joined, label: plan}
        try:
            _check_one_model(scores, with_it, searches)
        except PlanError:
            continue
        joined = joined if plan.digest in given else with_it
    return joined


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
