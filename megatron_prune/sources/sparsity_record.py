"""What was done to the weights of a sparse model, as a record on disk.

`engine.sparsify` sets weights to zero, and some methods change those that stay; ``sparsity.json``
says which matrices, how, from what text, how many zeros each has, and of those whose weights were
changed the SHA-256, so `verify` can hold them to it. It travels with the model's files like its
tokenizer, a few kB a layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError
from megatron_prune.files.parsing import checked_as, read_json
from megatron_prune.model.pattern import Pattern
from megatron_prune.sources.repair_record import record_text

VERSION = 1
_LONGEST = 80  # of a method's name
_MATRIX = re.compile(r"decoder\.layers\.[0-9]{1,5}\.[a-z0-9_.]{1,80}\.weight")


@dataclass(frozen=True, kw_only=True)
class SparseMatrix:
    """One matrix with zeros.

    Attributes:
        asked: the share of zeros that was asked for.
        pattern: such as 2:4; None for zeros anywhere.
        reached: the share of zeros it has in the source's dtype, unrounded, so that the number of
            zeros follows from it.
        energy: what is kept of the sum of Wanda's squared scores, ``|W_ij|^2 ||X_j||^2``; None
            where no text was read.
        error: ``||X W^T - X W'^T|| / ||X W^T||`` over the calibration text; None where the second
            moments were not gathered.
        sha256: where kept weights were changed, dtype name -> of the matrix's bytes in that dtype,
            row by row; None where they are the source's.
    """

    asked: float
    pattern: str | None
    reached: float
    energy: float | None = None
    error: float | None = None
    sha256: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """What one run did.

    Attributes:
        method: by name; with ``weight_update`` in the settings where that is not "none".
        sparsity: the share that was asked for; of a pattern alone ``1 - N / M``.
        pattern: None where none was asked for.
        reached: the share of zeros of all matrices that were pruned.
        settings: options, text and layout; JSON values.
        source_digest: `Source.digest` of what was pruned.
        tensors: canonical name -> what became of it. Matrices of layers only.
    """

    method: str
    sparsity: float
    pattern: str | None
    reached: float
    settings: Mapping[str, Any]
    source_digest: str
    tensors: Mapping[str, SparseMatrix]

    @property
    def how(self) -> str:
        """The method and what it was told to do: ``magnitude (weight update iter)``."""
        known, done = self.settings.get, []
        for name in ("weight_update", "sparsity_by_layer"):
            word = known(name)
            if isinstance(word, str) and word.isalpha() and word not in ("none", "uniform"):
                done.append(f"{name.replace('_', ' ')} {word}")
        flags = ("variant", "refit", "true_sequential", "upstream_statistics")
        done += [flag.replace("_", " ") for flag in flags if known(flag) is True]
        return f"{self.method} ({', '.join(done)})" if done else self.method

    @property
    def words(self) -> str:
        """Method and pattern: ``wanda, 2:4``."""
        return self.how if self.pattern is None else f"{self.how}, {self.pattern}"

    def to_json(self) -> str:
        """The file's text: one line per tensor."""
        top = {"version": VERSION, **{k: v for k, v in asdict(self).items() if k != "tensors"}}
        return record_text(top, self.tensors)


def load_sparsity(path: Path) -> Sparsity:
    """Read a record.

    Raises:
        DamagedError: it is none.
    """
    what = "not the record of a sparse model"
    values = read_json(path, DamagedError, what, unique=True)
    with checked_as(DamagedError, path, what):
        if values.pop("version") != VERSION:
            raise DamagedError(f"of another version; this reads {VERSION}")
        tensors = {name: _matrix(name, x) for name, x in values.pop("tensors").items()}
        record = Sparsity(tensors=tensors, **values)
        for name in ("method", "source_digest"):
            word = getattr(record, name)
            if not isinstance(word, str) or not word.isprintable() or len(word) > _LONGEST:
                raise ValueError(f"{name} is {word!r:.60}; wanted a word")
        if not isinstance(record.settings, dict):
            raise ValueError(f"settings is {record.settings!r:.60}; wanted a table")
        _check_shares("", record, "sparsity", "reached")
        _check_pattern("", record.pattern)
        return record


def parse_pattern(text: str) -> Pattern:
    """Raises:
    ValueError: not N:M with 0 < N < M.
    """
    if (found := Pattern.of(text)) is None:
        raise ValueError(f"pattern is {text!r:.60}; wanted N:M with 0 < N < M, or null")
    return found


def _matrix(name: str, values: Mapping[str, Any]) -> SparseMatrix:
    """A matrix' line of the record; raises ValueError or TypeError."""
    if _MATRIX.fullmatch(name) is None:
        raise ValueError(f"names {name!r:.60}; wanted matrices of layers, by their canonical names")
    found, where = SparseMatrix(**{"pattern": None, **values}), f"{name}: "
    _check_shares(where, found, "asked", "reached")
    _check_pattern(where, found.pattern)
    for word in ("energy", "error"):
        x = getattr(found, word)
        if x is not None and not (_is_number(x) and x >= 0):
            raise ValueError(f"{where}{word} is {x!r:.60}; wanted a number, at least 0")
    hashes = found.sha256
    if hashes is not None and not (
        isinstance(hashes, dict) and all(isinstance(x, str) for x in hashes.values())
    ):
        raise ValueError(
            f"{where}sha256 is {hashes!r:.60}; wanted a table of dtypes and digests, or null"
        )
    return found


def _check_shares(where: str, of: object, *names: str) -> None:
    for name in names:
        if not (_is_number(x := getattr(of, name)) and 0 <= x <= 1):
            raise ValueError(f"{where}{name} is {x!r:.60}; wanted a share, 0 to 1")


def _check_pattern(where: str, pattern: object) -> None:
    try:
        if pattern is not None:
            parse_pattern(str(pattern))
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)
