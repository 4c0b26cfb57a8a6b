"""The gates that were folded into a pruned model's weights, as a record on disk.

`sources.folded` multiplies the weights that a plan keeps by gates that were trained with them;
``folding.json`` beside the plan has every gate, so `verify` can make the same products of the
trained model. It travels wherever the plan does. In JSON a gate takes 13 bytes, the 32 x 11008 FFN
gates of a 7B model 5 MB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError
from megatron_prune.files.parsing import checked_as, read_json
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, SCORED_AXES, ModelConfig, ModelShape
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.shearing.folding import Gates

VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Folding:
    """What a pruned model's weights were multiplied by.

    Attributes:
        source_digest: `Source.digest` of the trained model, before it was pruned.
        settings: how the gates were learned; JSON values.
        gates: of the units that the plan keeps, in the numbering of the pruned model.
    """

    plan_digest: str
    source_digest: str
    settings: Mapping[str, Any]
    gates: Gates

    def to_json(self) -> str:
        """The file's text: one line per axis, or per layer of one."""
        top = {
            "version": VERSION,
            "plan_digest": self.plan_digest,
            "source_digest": self.source_digest,
            "settings": dict(self.settings),
        }
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in top.items()]
        axes = [
            f"  {json.dumps(AXES[axis].word)}: {_gate_lines(self.gates.by_axis[axis])}"
            for axis in SCORED_AXES
            if axis in self.gates.by_axis
        ]
        lines.append(' "gates": {\n' + ",\n".join(axes) + "\n }")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _gate_lines(gates: Tensor) -> str:
    """Nine digits tell every float32 from its neighbours, and JSON's float64 does not blur them."""
    if gates.ndim > 1:
        return "[\n" + ",\n".join(f"   {_gate_lines(row)}" for row in gates) + "\n  ]"
    return json.dumps([float(f"{gate:.9g}") for gate in gates.tolist()])


def load_folding(path: Path, plan: PrunePlan, target: ModelConfig) -> Folding:
    """Read the record of a model ``target`` that was pruned by ``plan``.

    Raises:
        DamagedError: not a record, one of another plan or trained model, or gates that do not fit
            the pruned model.
    """
    what = "not the record of gates that were folded"
    values = read_json(path, DamagedError, what, unique=True)
    with checked_as(DamagedError, path, what):
        if values["version"] != VERSION:
            raise DamagedError(f"version {values['version']!r:.60}; this reads {VERSION}")
        settings = values["settings"]
        if not isinstance(settings, dict):
            raise ValueError(f"settings is {settings!r:.60}; wanted a table")
        folding = Folding(
            plan_digest=values["plan_digest"],
            source_digest=values["source_digest"],
            settings=settings,
            gates=_gates(values["gates"], target.shape),
        )
    if folding.plan_digest != plan.digest:
        raise DamagedError(f"{path}: is of another plan than the one given")
    if folding.source_digest != plan.source_digest:
        raise DamagedError(
            f"{path}: source_digest is {folding.source_digest!r:.80}; wanted that of the plan, "
            f"{plan.source_digest!r}"
        )
    return folding


def _gates(values: Mapping[str, Any], shape: ModelShape) -> Gates:
    """The gates of the file; raises ShapeError, ValueError or TypeError."""
    letters = {AXES[axis].word: axis for axis in SCORED_AXES}
    if unknown := [word for word in values if word not in letters]:
        raise ValueError(f"gates of {unknown[0]!r:.60}; wanted some of {list(letters)}")
    by_axis = {
        letters[word]: torch.tensor(gates, dtype=torch.float32) for word, gates in values.items()
    }
    return Gates(shape=shape, by_axis=by_axis)
