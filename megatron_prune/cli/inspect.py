"""What a checkpoint is. Reads configuration and headers only.

megatron-prune inspect runs/llama --json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_prune.cli.options import opened, shape_table, show
from megatron_prune.families.names import FAMILIES
from megatron_prune.model.axes import count_parameters, names
from megatron_prune.model.grid import VOCAB_DIVISOR
from megatron_prune.model.lora import Lora
from megatron_prune.sources.source import DTYPE_NAMES, Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="any checkpoint directory")
    parser.add_argument("--family", choices=FAMILIES, help="of a stock Megatron checkpoint")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _factors(lora: Lora) -> dict[str, Any]:
    return {
        "lora_rank": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_targets": " ".join(lora.targets),
        "lora_keep_zeros": lora.keep_zeros,
    }


def facts(source: Source) -> dict[str, Any]:
    """The object ``--json`` prints."""
    config, grid = source.config, source.grid
    dtypes = sorted({DTYPE_NAMES.get(source.dtype(n), str(source.dtype(n))) for n in names(config)})
    return {
        "path": str(source.path),
        "format": source.format,
        "family": config.family,
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
        **({} if source.lora is None else _factors(source.lora)),
    }


def run(args: argparse.Namespace) -> None:
    with opened(args.path, args.family) as source:
        found = facts(source)
        if args.json:
            show(json.dumps(found, indent=2))
            return
        show(shape_table(source.config.shape))
        for name, value in found.items():
            if name != "shape":
                show(f"{name:<30}{value:,}" if type(value) is int else f"{name:<30}{value}")
