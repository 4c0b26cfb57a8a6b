"""Measure how long a layer takes on this machine, for `plan --target-latency`.

  megatron-prune profile --load llama --save latency.json --seq-length 4096 --bf16
  megatron-prune plan --load llama --save plan.json --target-latency 120ms \\
      --latency-table latency.json

The command times a forward of --batch-size sequences through one layer at several sizes, and
through the output layer, with random weights; it reads the checkpoint's configuration only. Run it
alone on the machine, with the threads, the dtype and (under torchrun) the tensor-parallel size the
model will have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.engine.running import Engine
from megatron_prune.files import replace_file
from megatron_prune.flags import flag, positive
from megatron_prune.planning.latency import LatencyTable, fit_latency
from megatron_prune.stages.common import Loads, agree_on_start, check_output_file, opened
from megatron_prune.stages.console import SILENT, Console


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(Engine, Loads):
    save: Path = flag("JSON file", metavar="TABLE")
    overwrite: bool = flag("replace an existing table", default=False)
    seq_length: int = flag("tokens a sequence", default=1024, parse=positive, metavar="N")
    batch_size: int = flag("sequences at once", default=1, parse=positive, metavar="N")
    repeats: int = flag(
        "timed forwards of each size; the median counts", default=5, parse=positive, metavar="N"
    )


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """What was measured; as text beside what the fitted line says."""

    table: LatencyTable

    def __str__(self) -> str:
        return "\n".join(_rows(self.table))


def profile(options: ProfileOptions, console: Console = SILENT) -> Profiled:
    """The times of layers of several sizes, measured here and written to ``save``.

    Raises:
        ConfigError, ShapeError: a model that cannot be run so.
    """
    check_output_file(options.save, overwrite=options.overwrite, inputs=(options.load,))
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.forward.model import ModelOptions, check_model
    from megatron_prune.engine.groups import data_parallel_size, model_parallel, world_size
    from megatron_prune.engine.profile import measure_table

    grid = options.grid
    data_parallel_size(grid, world_size())
    model = ModelOptions.of(options, options.seq_length)
    with opened(options.load, options.family) as source:
        config = source.config
        config.shape.check_uniform("profile", "profile its source")
        grid.check(config.shape)
        check_model(config, model, grid.tensor_parallel)
        timeout = options.distributed_timeout_minutes
        with model_parallel(grid, timeout_minutes=timeout) as groups:
            agree_on_start(groups.ranks, options, source)
            table = measure_table(
                config,
                groups,
                model,
                batch_size=options.batch_size,
                repeats=options.repeats,
                progress=console.say,
            )
            on_first_rank(
                groups.ranks, lambda: replace_file(options.save, table.to_json().encode())
            )
    return Profiled(table=table)


def _rows(table: LatencyTable) -> Iterator[str]:
    model = fit_latency(table)
    fixed = {"K": 0, "V": 0, "L": 1}
    yield (
        f"{table.device}, {table.threads} threads, {table.dtype}, {table.batch_size} x "
        f"{table.seq_length} tokens, TP {table.tensor_parallel}"
    )
    yield (
        f"{'hidden':>8}{'heads':>8}{'groups':>8}{'ffn':>8}{'ms':>10}{'fitted':>10}{'TFLOP/s':>10}"
    )
    width = table.kv_channels
    for row in table.layers:
        sizes = {**fixed, "D": row.hidden, "Q": row.heads, "K": row.groups, "F": row.ffn}
        fitted = float(model.seconds_at(sizes)) - model.output[0]
        per_token = row.hidden * (2 * width * (row.heads + row.groups) + 3 * row.ffn)
        flops = 2 * table.tokens * (per_token + row.heads * width * table.seq_length)
        yield (
            f"{row.hidden:>8}{row.heads:>8}{row.groups:>8}{row.ffn:>8}{row.seconds * 1e3:>10.3f}"
            f"{fitted * 1e3:>10.3f}{flops / row.seconds / 1e12:>10.3f}"
        )
    for out in table.outputs:
        yield (
            f"output layer: hidden {out.hidden}, vocabulary {out.vocab}: {out.seconds * 1e3:.3f} ms"
        )
    yield (f"largest error of the fit: {model.worst_error:.1%}")
