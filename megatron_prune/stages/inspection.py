"""What a checkpoint is. Reads configuration and headers only.

megatron-prune inspect runs/llama --json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.families import FAMILIES
from megatron_prune.flags import flag
from megatron_prune.model.axes import count_parameters, names
from megatron_prune.model.grid import VOCAB_DIVISOR
from megatron_prune.model.lora import Lora
from megatron_prune.model.shape import ModelShape
from megatron_prune.model.tensors import dtype_word
from megatron_prune.planning.plan import load_plan
from megatron_prune.sources.folding_record import load_folding
from megatron_prune.sources.source import Source
from megatron_prune.sources.sparsity_record import load_sparsity
from megatron_prune.stages.common import opened, shape_table
from megatron_prune.stages.console import SILENT, Console


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    path: Path = flag("any checkpoint directory", metavar="PATH", positional=True)
    family: str | None = flag(
        "of a stock Megatron checkpoint", default=None, choices=tuple(FAMILIES)
    )
    json: bool = flag("print one JSON object", default=False)


@dataclass(frozen=True, kw_only=True)
class Inspected:
    """What a checkpoint is; ``facts`` are plain JSON values."""

    shape: ModelShape
    facts: dict[str, Any]
    as_json: bool

    def __str__(self) -> str:
        if self.as_json:
            return json.dumps(self.facts, indent=2)
        rows = [
            f"{name:<30}{value:,}" if type(value) is int else f"{name:<30}{_word(value)}"
            for name, value in self.facts.items()
            if name != "shape"
        ]
        return "\n".join([shape_table(self.shape), *rows])


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


def inspect(options: InspectOptions, console: Console = SILENT) -> Inspected:
    """The facts of a checkpoint.

    Raises:
        CheckpointError, DamagedError: see `open_source`.
    """
    with opened(options.path, options.family) as source:
        return Inspected(shape=source.config.shape, facts=_facts(source), as_json=options.json)


def _factors(lora: Lora) -> dict[str, Any]:
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_targets": " ".join(lora.targets),
        "lora_keep_zeros": lora.keep_zeros,
    }


def _sparsity(path: Path) -> dict[str, Any]:
    """As it is recorded: no weight is read, and training may have changed them since."""
    record = load_sparsity(path)
    return {
        "sparsity_method": record.how,
        "sparsity_pattern": record.pattern,
        "sparsity_asked": record.sparsity,
        "sparsity_reached": record.reached,
        "sparse_matrices": len(record.tensors),
    }


def _folding(source: Source) -> dict[str, Any]:
    """As it is recorded: training may have changed the weights since."""
    if source.plan_path is None or source.folding_path is None:
        return {}
    record = load_folding(source.folding_path, load_plan(source.plan_path), source.config)
    return {
        "folded_gates": " ".join(record.gates.words),
        "folded_source_digest": record.source_digest,
    }


def _facts(source: Source) -> dict[str, Any]:
    """The object ``--json`` prints."""
    config, grid = source.config, source.grid
    dtypes = sorted({dtype_word(source.dtype(n)) for n in names(config)})
    return {
        "path": str(source.path),
        "format": source.format,
        "family": config.family.name,
        "shape": config.shape.as_dict(),
        "padded_vocab_size": source.stored_vocab_size,
        # not padded yet: to multiples of this times TP, when it is converted
        **({"make_vocab_size_divisible_by": VOCAB_DIVISOR} if source.format == "hf" else {}),
        "parameters": count_parameters(config),
        "tensor_model_parallel_size": grid.tensor_parallel,
        "pipeline_model_parallel_size": grid.pipeline_parallel,
        "dtype": dtypes[0] if len(dtypes) == 1 else "+".join(dtypes),
        "tied": config.tied,
        "iteration": source.iteration,
        "pruned": source.plan_path is not None,
        **_folding(source),
        **({} if source.sparsity_path is None else _sparsity(source.sparsity_path)),
        **({} if source.lora is None else _factors(source.lora)),
    }
