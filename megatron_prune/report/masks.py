"""What a run of `shear` has told of its masks: in its metrics, and in the files it ends with.

A run that has not ended has no plan and no gates yet, one of another kind has nothing of all this,
and a row that is damaged is passed over: every function gives what there is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.model.shape import AXES
from megatron_prune.report.runs import Points, Run
from megatron_prune.shearing.constraint import PARAMETERS
from megatron_prune.shearing.words import BY_LAYER, EXPECTED, MASK_SCORES
from megatron_prune.store.passenger import PLAN

HALF = 0.5  # a layer that is expected to be gone for more than this is dead

# what metrics call it -> what the page does; the last where only the size of the model is held
UNITS = {AXES[letter].word: f"{AXES[letter].unit}s" for letter in "DQKFL"}
HELD = {**UNITS, PARAMETERS: PARAMETERS}


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What was expected to be gone of every layer.

    Attributes:
        iterations: the logged ones, rising.
        rows: a row each, a share a layer.
    """

    iterations: Sequence[float]
    rows: Sequence[Sequence[float]]

    def died(self) -> list[float | None]:
        """For each layer the first iteration from which on its share stays above `HALF`."""
        found = []
        for shares in zip(*self.rows):
            alive = [at for at, share in enumerate(shares) if share <= HALF]
            first = alive[-1] + 1 if alive else 0
            found.append(self.iterations[first] if first < len(shares) else None)
        return found


def held_words(run: Run) -> list[str]:
    """What the run holds to a target, by the words of its metrics; empty without masks."""
    return [word for word in HELD if run.last(f"{EXPECTED} {word}") is not None]


def points_of(run: Run, kind: str, word: str) -> Points:
    """(iteration, value) of one of the kinds above."""
    return run.points(f"{kind} {word}", over_tokens=False)


def shares_gone(run: Run) -> dict[str, Shares]:
    """By the axis' word, of every axis that layers have units of, and of the layers."""
    found = {word: list(_rows(run, word)) for word in UNITS}
    shares = {}
    for word, rows in found.items():
        if not rows:
            continue
        layers, _ = Counter(len(row) for _, row in rows).most_common(1)[0]
        whole = [(iteration, row) for iteration, row in rows if len(row) == layers]
        iterations, values = zip(*whole)
        shares[word] = Shares(iterations=iterations, rows=values)
    return shares


def _rows(run: Run, word: str) -> Iterator[tuple[float, list[float]]]:
    for row in run.rows:
        told = row.get(BY_LAYER)
        shares = told.get(word) if isinstance(told, dict) else None
        if isinstance(shares, list) and shares and all(map(_is_share, shares)):
            yield float(row["iteration"]), [float(share) for share in shares]


def _is_share(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def learned_files(run: Run) -> list[Path]:
    """The plan and the gates beside a run's metrics, those that are there."""
    if not held_words(run):
        return []
    return [path for name in (PLAN, MASK_SCORES) if (path := run.path.parent / name).is_file()]
