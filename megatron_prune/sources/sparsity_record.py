"""What was done to the weights of a sparse model, as a record on disk.

`engine.sparsify` sets weights to zero, and some methods change those that stay; ``sparsity.json``
says which matrices, how, from what text, how many zeros each has, and of those whose weights were
changed the SHA-256, so `verify` can hold them to it. It travels with the model's files like its
tokenizer, a few kB a layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError
from megatron_prune.files.parsing import checked_as, read_json

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SparseMatrix:
    """One matrix with zeros.

    Attributes:
        asked: the share of zeros that was asked for.
        pattern: such as 2:4; None for zeros anywhere.
        reached: the share of zeros it has.
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
        tensors: canonical name -> what became of it.
    """

    method: str
    sparsity: float
    pattern: str | None
    reached: float
    settings: Mapping[str, Any]
    source_digest: str
    tensors: Mapping[str, SparseMatrix]

    def to_json(self) -> str:
        """The file's text: one line per tensor."""
        top = {"version": VERSION, **{k: v for k, v in asdict(self).items() if k != "tensors"}}
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in top.items()]
        tensors = []
        for name, matrix in self.tensors.items():
            values = {k: v for k, v in asdict(matrix).items() if v is not None}
            tensors.append(f"  {json.dumps(name)}: {json.dumps(values)}")
        lines.append(' "tensors": {\n' + ",\n".join(tensors) + "\n }")
        return "{\n" + ",\n".join(lines) + "\n}\n"


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
        tensors = {
            name: SparseMatrix(**{"pattern": None, **fields})
            for name, fields in values.pop("tensors").items()
        }
        return Sparsity(tensors=tensors, **values)
