"""What a repair replaced, as a record on disk.

Pruning by itself only slices. A repair computes some tensors anew (`engine.repair`); they are
written into the checkpoint like all others, and ``repair.json`` beside its plan says which, how,
from what text, how much it helped, and the SHA-256 of each, so `verify` can hold them to it. The
record is a few kB per layer and travels wherever the plan does; the tensors are not kept twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError
from megatron_prune.files.parsing import checked_as, read_json
from megatron_prune.model.axes import axes_of, names, split_layer
from megatron_prune.model.blocks import FINAL_NORM
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import DTYPES, torch_dtype
from megatron_prune.planning.plan import PrunePlan

VERSION = 1


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
        return record_text(top, self.tensors)


def record_text(top: Mapping[str, Any], tensors: Mapping[str, Any]) -> str:
    """A record of tensors as JSON, one line each.

    Args:
        top: what it says of the whole.
        tensors: name -> a dataclass; fields that are None are left out.
    """
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in top.items()]
    rows = []
    for name, one in tensors.items():
        values = {k: v for k, v in asdict(one).items() if v is not None}
        rows.append(f"  {json.dumps(name)}: {json.dumps(values)}")
    lines.append(' "tensors": {\n' + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def load_repair(path: Path, plan: PrunePlan, target: ModelConfig) -> Repair:
    """Read the record of a model ``target`` that was pruned by ``plan``.

    Raises:
        DamagedError: not a record, one of another plan, or one that claims a tensor which no repair
            replaces.
    """
    what = "not the record of a repair"
    values = read_json(path, DamagedError, what, unique=True)
    with checked_as(DamagedError, path, what):
        if values["version"] != VERSION:
            raise DamagedError(f"version {values['version']!r}; this reads {VERSION}")
        tensors = {name: _replaced(fields) for name, fields in values["tensors"].items()}
        repair = Repair(
            plan_digest=values["plan_digest"],
            source_digest=values["source_digest"],
            settings=dict(values["settings"]),
            tensors=tensors,
        )
    if repair.plan_digest != plan.digest:
        raise DamagedError(f"{path}: is of another plan than the one given")
    # of a layer what reads or writes the hidden state, and the norms
    replaceable = {n for n in names(target) if split_layer(n)[0] is not None and "D" in axes_of(n)}
    for name in tensors:
        if name not in {*replaceable, FINAL_NORM.name}:
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
    return {word: digest(x.to(torch_dtype(word))) for word in DTYPES}


def digest(x: Tensor) -> str:
    """SHA-256 of a tensor's values as they lie, row by row."""
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().data).hexdigest()
