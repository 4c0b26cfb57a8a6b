"""What travels with a model's weights from format to format: config, tokenizer files, plan, facts.

A Hugging Face directory holds them beside the weights. A Megatron iteration directory holds the
Hugging Face files in ``hf/``, the plan in ``plan.json`` and the records of a repair and of folded
gates beside it, so that it is one whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.families.block_configs import CODE, code
from megatron_prune.families.config import CONFIG, hf_config
from megatron_prune.files import write_file
from megatron_prune.files.parsing import parse_json
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelConfig
from megatron_prune.sources.source import COMMANDS, FOLDING, REPAIR, Source

COMPANIONS, PLAN = "hf", "plan.json"


def commands_of(source: Source) -> list[str]:
    """Lines of ``commands.jsonl``, oldest first: those that travel with a model, then those of the
    run it lies in that took part in its training. Lines that are none of ours are left out."""
    carried = source.companion_files.get(COMMANDS)
    lines = [] if carried is None else _command_lines(carried)
    own = source.path.parent / COMMANDS
    if source.iteration and own.is_file():
        lines += [
            line for line in _command_lines(own) if json.loads(line)["iteration"] < source.iteration
        ]
    return lines


def _command_lines(path: Path) -> list[str]:
    kinds = {"iteration": int, "processes": int, "argv": list, "version": str}
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = parse_json(line)
            if all(isinstance(row[name], kind) for name, kind in kinds.items()):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


@dataclass(frozen=True, kw_only=True)
class Passenger:
    """Held in memory: a training run may drop the checkpoint it came from (``--keep-last``).

    Attributes:
        config: of the model as it will be written.
        files: of the model's Hugging Face directory, by name; config.json apart.
        plan: the plan the model was pruned with, None when it was not.
        repair: the record of its repair (`sources.repair_record`), None when there was none.
        folding: the record of its gates (`sources.folding_record`), None when it had none.
    """

    config: ModelConfig
    files: Mapping[str, bytes]
    plan: bytes | None
    repair: bytes | None = None
    folding: bytes | None = None

    @classmethod
    def of(
        cls,
        source: Source,
        plan: bytes | None = None,
        repair: bytes | None = None,
        folding: bytes | None = None,
    ) -> Passenger:
        """Read from a source.

        Args:
            plan, repair, folding: the files of the plan it is pruned with just now, of its repair
                and of its gates; else those it carries.
        """
        if plan is None and source.plan_path is not None:
            plan = source.plan_path.read_bytes()
            repair, folding = (
                None if path is None else path.read_bytes()
                for path in (source.repair_path, source.folding_path)
            )
        files = {name: path.read_bytes() for name, path in source.companion_files.items()}
        if source.config.shape.ffn_per_layer is not None:
            files[CODE] = code()
        return cls(config=source.config, files=files, plan=plan, repair=repair, folding=folding)

    @property
    def plan_digest(self) -> str | None:
        return None if self.plan is None else hashlib.sha256(self.plan).hexdigest()

    def write(self, directory: Path, format: str) -> None:
        """Write it beside the weights in ``directory``."""
        target = directory if format == "hf" else directory / COMPANIONS
        target.mkdir(exist_ok=True)
        for name, data in self.files.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(target / name, data)
        config = json.dumps(hf_config(self.config), indent=2) + "\n"
        write_file(target / CONFIG, config.encode())
        for name, record in ((PLAN, self.plan), *self._records.items()):
            if record is not None:
                write_file(directory / name, record)

    @property
    def _records(self) -> dict[str, bytes | None]:
        """What lies beside the plan."""
        return {REPAIR: self.repair, FOLDING: self.folding}

    def facts(self, format: str, grid: ParallelGrid) -> dict[str, Any]:
        """What the manifest says of the model."""
        records = {
            f"{name.removesuffix('.json')}_digest": hashlib.sha256(data).hexdigest()
            for name, data in self._records.items()
            if data is not None
        }
        return {
            "format": format,
            "family": self.config.family.name,
            "shape": self.config.shape.as_dict(),
            "parameters": count_parameters(self.config),
            "tied": self.config.tied,
            "dtype": self.config.dtype,
            "tensor_model_parallel_size": grid.tensor_parallel,
            "pipeline_model_parallel_size": grid.pipeline_parallel,
            "plan_digest": self.plan_digest,
            **records,
        }
