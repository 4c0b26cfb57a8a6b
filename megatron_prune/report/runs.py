"""Training runs as a report reads them: the rows of ``metrics.jsonl``, and what lies beside it.

Rows are read for what they have: a run without domains, or of an older version, is one with fewer
series, and `Run.missing` names what it lacks. Nothing is read from checkpoints but the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from megatron_prune.errors import CheckpointError, ConfigError, DamagedError
from megatron_prune.files import hash_file
from megatron_prune.parsing import parse_json
from megatron_prune.sources.source import COMMANDS
from megatron_prune.store.commit import MANIFEST, read_manifest
from megatron_prune.store.open import iteration_directory

METRICS = "metrics.jsonl"
LOSS, VALIDATION, TOKENS = "lm loss", "validation loss", "consumed-tokens"
COURSE = {
    "learning-rate": "learning rate",
    "grad-norm": "gradient norm",
    "tokens-per-second": "tokens/s",
}
DOMAINS = {
    "domain loss": "loss of a domain",
    "domain weight": "weight of a domain",
    "domain tokens": "tokens of a domain",
}
Points = list[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        rows: logged iterations and validations, one an iteration, rising; keys as they stand in the
            file.
        facts: what the newest checkpoint's manifest says of it; empty without a checkpoint.
        commands: what was started, in order: ``iteration`` it went on from, ``argv`` and more.
    """

    path: Path
    rows: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[Mapping[str, Any]] = ()

    def points(self, key: str, *, over_tokens: bool) -> Points:
        """(tokens or iteration, value) of every row that has a number under ``key``."""
        found, tokens = [], 0.0
        for row in self.rows:
            tokens = _number(row.get(TOKENS), tokens)
            value = _number(row.get(key))
            if value is not None:
                found.append((tokens if over_tokens else float(row["iteration"]), value))
        return found

    def last(self, key: str) -> float | None:
        """The newest value under ``key``."""
        points = self.points(key, over_tokens=False)
        return points[-1][1] if points else None

    def middle(self, key: str) -> float | None:
        """The median of all values under ``key``."""
        points = self.points(key, over_tokens=False)
        return median(value for _, value in points) if points else None

    def domains(self, kind: str) -> list[str]:
        """Names that follow ``kind/`` in any row, in the order of their first appearance."""
        keys = dict.fromkeys(key for row in self.rows for key in row)
        return [key[len(kind) + 1 :] for key in keys if key.startswith(f"{kind}/")]

    @property
    def has_tokens(self) -> bool:
        return any(TOKENS in row for row in self.rows)

    @property
    def missing(self) -> list[str]:
        """What a report would show and the rows do not have, in words."""
        plain = {LOSS: "training loss", VALIDATION: "validation loss", TOKENS: "tokens", **COURSE}
        lacks = [text for key, text in plain.items() if self.last(key) is None]
        return lacks + [text for kind, text in DOMAINS.items() if not self.domains(kind)]


def _number(value: Any, default: Any = None) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number else default


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``, those of one iteration joined, the later value counting.

    A line that a killed run left half written at the end is passed over.

    Raises:
        ConfigError: no such file, or a line that is not a JSON object with an iteration.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; wanted the metrics.jsonl of a run") from None
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            iteration = int(row["iteration"])
        except (ValueError, KeyError, TypeError, OverflowError):
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}, line {number}: wanted a JSON object with 'iteration', found {line[:80]!r}"
            ) from None
        rows.setdefault(iteration, {}).update(row)
    if not any(key in row for row in rows.values() for key in (LOSS, VALIDATION)):
        raise ConfigError(f"{path}: {len(lines)} lines and no 'lm loss' among them; has it run?")
    return [rows[iteration] for iteration in sorted(rows)]


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run's directory, or the metrics of one."""
    return (path / METRICS).is_file() or (path.is_file() and path.suffix == ".jsonl")


def read_run(path: Path) -> Run:
    """A run's directory, or its metrics alone.

    Raises:
        ConfigError: see `read_rows`.
    """
    if path.is_file():
        return Run(path=path, rows=read_rows(path))
    return Run(
        path=path / METRICS,
        rows=read_rows(path / METRICS),
        facts=_checkpoint_facts(path),
        commands=_commands(path / COMMANDS),
    )


def _checkpoint_facts(directory: Path) -> Mapping[str, Any]:
    """The newest checkpoint's manifest and the SHA-256 of it; a run may well have none yet."""
    try:
        newest = iteration_directory(directory)
        facts, _ = read_manifest(newest)
    except (CheckpointError, DamagedError):
        return {}
    return {"checkpoint": newest.name, **facts, MANIFEST: hash_file(newest / MANIFEST).sha256}


def _commands(path: Path) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            row = parse_json(line)
        except ValueError:
            continue  # cut short by a kill
        if isinstance(row, dict) and isinstance(row.get("argv"), list):
            found.append(row)
    return found


def thinned(points: Points, most: int) -> Points:
    """At most ``most`` of the points, evenly, the last among them; others are left out."""
    step = max(1, math.ceil(len(points) / most))
    kept = points[::-1][::step]
    return kept[::-1]
