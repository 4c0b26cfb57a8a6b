"""Judge a model on a text: loss, perplexity, bits per byte.

  megatron-prune evaluate --load llama-pruned --data held_out.txt
  megatron-prune evaluate --load llama-pruned --tasks boolq:32 --save tasks.json

The command takes any checkpoint at any layout: a model stored at TP=8 is evaluated alone or by as
many processes as torchrun starts. The text is tokenised once with the model's own tokenizer,
without special tokens, and cut into windows of --seq-length tokens that do not overlap.

With --domains instead of --data the command tells the loss on each domain's validation part, on
the windows that `train --domains` looks at under the same --seq-length, --split and --seed. With
--tasks the model answers benchmark questions instead, through lm-evaluation-harness.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.options import EvaluateOptions
from megatron_prune.files import replace_file
from megatron_prune.stages.common import check_output_file
from megatron_prune.stages.console import SILENT, Console


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """How good a model is.

    Attributes:
        facts: what was found and what decided it, as plain JSON values.
        lines: of it, what is shown.
    """

    facts: Mapping[str, Any]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def evaluate(options: EvaluateOptions, console: Console = SILENT) -> Evaluated | None:
    """Judge a model on a text, on domains or by tasks; None on ranks that take no part in it.

    Raises:
        ConfigError: options that do not go together or do not fit the model.
        ShapeError: the layout does not fit the model or the processes.
        CheckpointError: there is no model at ``load``.
        DamagedError: a loss is not a number.
    """
    from megatron_prune.engine.groups import data_parallel_size, world_size

    judge = {"data": _on_text, "domains": _on_domains, "tasks": _by_tasks}[options.chosen()]
    data_parallel_size(options.grid, world_size())
    return judge(options, console)


def _on_text(options: EvaluateOptions, console: Console) -> Evaluated:
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.evaluate import text

    if options.json is not None:
        inputs = (options.load, options.data, options.tokenizer_model)
        check_output_file(options.json, overwrite=True, inputs=inputs, flag="--json")
    started = time.monotonic()
    source = text.open_checked(options)
    with model_parallel(
        options.grid, timeout_minutes=options.distributed_timeout_minutes
    ) as groups:
        found = text.evaluate(source, options, groups, lambda: console.bar("", unit="window"))
        if groups.ranks.is_first:
            _write(options.json, found)
    console.say(f"{time.monotonic() - started:.1f} s in all, with loading and tokenising")
    lines = [f"{name:<14} {found[name]:.6f}" for name in ("loss", "perplexity", "bits_per_byte")]
    lines += [f"{name:<14} {found[name]}" for name in ("tokens", "windows")]
    if "sparsity" in found:
        pattern = f", {found['sparsity_pattern']}" if found["sparsity_pattern"] else ""
        lines += [f"{'sparsity':<14} {found['sparsity']:.6f} ({found['sparsity_method']}{pattern})"]
    lines += [f"{'tokens/s':<14} {found['tokens_per_second']:.1f}"]
    lines += [f"{'seconds':<14} {found['seconds']:.2f}"]
    return Evaluated(facts=found, lines=tuple(lines))


def _on_domains(options: EvaluateOptions, console: Console) -> Evaluated:
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.evaluate import domains, text

    if options.save is not None:
        inputs = (options.load, options.domains, options.tokenizer_model)
        check_output_file(options.save, overwrite=True, inputs=inputs)
    source = text.open_checked(options)
    with model_parallel(
        options.grid, timeout_minutes=options.distributed_timeout_minutes
    ) as groups:
        found = domains.evaluate_domains(
            source, options, groups, lambda: console.bar("domains", unit="domain")
        )
        if groups.ranks.is_first:
            _write(options.save, found)
    rows = found["domains"].items() if options.per_domain else ()
    lines = [f"{name:<14} {row['loss']:.6f}  {row['tokens']} tokens" for name, row in rows]
    return Evaluated(facts=found, lines=(*lines, f"{'loss':<14} {found['loss']:.6f}"))


def _by_tasks(options: EvaluateOptions, console: Console) -> Evaluated | None:
    from megatron_prune.engine.groups import model_parallel, world_size
    from megatron_prune.evaluate import tasks

    tasks.wanted_tasks(options)
    tasks.check_harness()
    if options.save is not None:
        inputs = (options.load, options.include_path, options.tokenizer_model)
        check_output_file(options.save, overwrite=True, inputs=inputs)
    source = tasks.open_for_tasks(options)
    if _uses_transformers(options.backend, source.format, world_size()):
        found: dict[str, Any] | None = tasks.evaluate_by_transformers(source, options)
    else:
        with model_parallel(
            options.grid, timeout_minutes=options.distributed_timeout_minutes
        ) as groups:
            found = tasks.evaluate_on_ranks(source, options, groups)
    if found is None:
        return None
    _write(options.save, found)
    return Evaluated(facts=found, lines=tuple(_task_lines(found)))


def _uses_transformers(backend: str, ckpt_format: str, processes: int) -> bool:
    if backend == "hf" and (ckpt_format != "hf" or processes > 1):
        raise ConfigError(
            f"--backend hf: takes a Hugging Face directory in one process, found {ckpt_format} in "
            f"{processes}; use --backend megatron, or convert --to hf"
        )
    return backend == "hf" or (backend == "auto" and ckpt_format == "hf" and processes == 1)


def _task_lines(found: Mapping[str, Any]) -> list[str]:
    from megatron_prune.report.judged import task_scores

    lines = []
    for name, (score, error) in task_scores(found).items():
        spread = "" if error is None else f" ± {error:.4f}"
        shots = found["n-shot"].get(name.partition(",")[0], "n/a")
        lines.append(f"{name:<40} {score:.4f}{spread}  ({shots}-shot)")
    return lines


def _write(path: Path | None, found: Mapping[str, Any]) -> None:
    if path is not None:
        replace_file(path, (json.dumps(found, indent=1, default=str) + "\n").encode())
