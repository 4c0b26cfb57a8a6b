"""Train a checkpoint on: recovery after pruning, or a baseline from random weights.

  megatron-prune train --load llama-pruned --save runs/recovered --data-path corpus_text_document \\
      --train-iters 1000 --micro-batch-size 4 --seq-length 2048 --lr 1e-4

The command takes a checkpoint of any format and layout, and Megatron's flags. When --save already
holds a run, that run continues, at any TP, PP and number of processes; the same command can be
started again and again.
"""

from __future__ import annotations

from megatron_prune.engine.groups import model_parallel, world_size
from megatron_prune.engine.train.checks import check_options
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.stages.console import SILENT, Console


def train(options: TrainOptions, console: Console = SILENT) -> str | None:
    """Train; what happens on the way is told on standard error and kept in ``metrics.jsonl``.

    Returns:
        With ``dry_run`` what would happen, else None.

    Raises:
        PruneError: whatever cannot be used, before the first weight is read.
        Interrupted: after a signal, everything saved.
    """
    grid, contexts, processes = options.grid, options.context_parallel_size, world_size()
    if options.dry_run and processes == 1:
        processes = grid.world_size * contexts  # one copy of the model, whatever was started
    check_options(options, grid, processes)
    if options.dry_run:
        from megatron_prune.engine.train.dry_run import describe

        return describe(options, grid, processes)
    from megatron_prune.engine.train.loop import train as run

    with model_parallel(
        grid,
        context_parallel=contexts,
        seed=options.seed,
        timeout_minutes=options.distributed_timeout_minutes,
    ) as groups:
        run(options, groups, options.command)
    return None
