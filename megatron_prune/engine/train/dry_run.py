"""What a training run would do, said before it is started: no process group, no weight read but
those in which ``--keep-zeros`` looks for a zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from megatron_prune.engine.forward.lora import factor_parameters
from megatron_prune.engine.groups import data_parallel_size
from megatron_prune.engine.objectives.distillation import kept_logits_bytes
from megatron_prune.engine.train.checkpoint import find_start
from megatron_prune.engine.train.inputs import (
    open_corpora,
    open_model,
    open_run_teachers,
)
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.engine.train.zeros import check_zeros
from megatron_prune.model import axes
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import torch_dtype
from megatron_prune.sources.source import Source


def stage_parameters(config: ModelConfig, grid: ParallelGrid, pp_rank: int) -> int:
    """Parameters one rank of a pipeline stage holds, padding and a tied copy included."""
    shape, split = config.shape, grid.tensor_parallel

    def local(weight: axes.Weight) -> int:
        whole = prod(axes.tensor_shape(weight.name, shape))
        return whole if axes.split_dim(weight.axes) is None else whole // split

    vocabulary = padded_vocab_size(shape.vocab_size, split) // split * shape.hidden_size
    first, last = pp_rank == 0, pp_rank == grid.pipeline_parallel - 1
    copies = int(first) + int(last and not (config.tied and first))
    per_layer = sum(local(weight) for weight in axes.layer_weights(config))
    layers = len(grid.stage_layers(shape.num_layers, pp_rank))
    return layers * per_layer + copies * vocabulary + last * shape.hidden_size


def bytes_per_parameter(dtype: str, distributed_copies: int = 1) -> float:
    """Weights, float32 gradients and Adam's state; the latter split over copies of the model."""
    if dtype == "fp32":
        return 4 + 4 + 8 / distributed_copies
    return 2 + 4 + 12 / distributed_copies  # and float32 master weights


def _trained(
    options: TrainOptions, config: ModelConfig, grid: ParallelGrid, copies: int, freezes: bool
) -> tuple[dict[str, str], float]:
    """A row on the factors of a LoRA run, and the bytes of the fullest rank of any run."""
    fixed = torch_dtype(options.dtype).itemsize
    share = copies * options.context_parallel_size if options.use_distributed_optimizer else 1
    each = fixed if freezes else bytes_per_parameter(options.dtype, share)
    stages = range(grid.pipeline_parallel)
    if options.lora is None:
        return {}, max(stage_parameters(config, grid, p) for p in stages) * each
    lora, shape = options.lora, config.shape
    factors = [factor_parameters(lora, shape, grid, p) for p in stages]
    whole = factor_parameters(lora, shape, ParallelGrid(), 0)
    told = f"{lora.flags}: trains {whole:,} parameters, on the fullest rank {max(factors):,}"
    return {"lora": told}, max(
        stage_parameters(config, grid, p) * fixed + factors[p] * each for p in stages
    )


def _teachers(
    options: TrainOptions, grid: ParallelGrid, copies: int, teachers: Sequence[Source]
) -> dict[str, str]:
    """A row a teacher: where it lies and what it adds to the fullest rank."""
    rows = {}
    size = torch_dtype(options.dtype).itemsize
    micro = options.micro_batch_size
    count = options.batch_size(copies) // (micro * copies)
    tokens = micro * options.seq_length // options.context_parallel_size
    for number, source in enumerate(teachers, 1):
        config, own = source.config, grid.for_layers(source.config.shape.num_layers)
        largest = max(stage_parameters(config, own, p) for p in range(own.pipeline_parallel))
        vocabulary = config.shape.vocab_size
        logits = kept_logits_bytes(options.dtype, vocabulary, grid, tokens, count)
        rows[f"teacher {number}" if len(teachers) > 1 else "teacher"] = (
            f"{source.path}, {axes.count_parameters(config):,} parameters: "
            f"{largest * size / 1e9:.2f} GB a rank for weights, {logits / 1e9:.2f} GB on the last "
            "stage for logits"
        )
    return rows


def describe(
    options: TrainOptions, grid: ParallelGrid, processes: int, *, freezes: bool = False
) -> str:
    """Check everything that `train` checks before it builds the model, and tell the plan.

    Args:
        freezes: the weights have neither gradients nor optimizer.

    Raises:
        PruneError: whatever cannot be used.
    """
    start = find_start(options, mend=False)
    source = open_model(options, start, grid)
    if options.keep_zeros:
        check_zeros(source)
    facts = open_corpora(options, start, source)
    contexts = options.context_parallel_size
    config, copies = source.config, data_parallel_size(grid, processes, contexts)
    largest = max(stage_parameters(config, grid, p) for p in range(grid.pipeline_parallel))
    lora, memory = _trained(options, config, grid, copies, freezes)
    batch, steps = options.batch_size(copies), options.train_iters - start.iteration
    begins = "random weights" if options.init_random else str(start.directory)
    if start.state is not None:
        begins = f"{start.directory}, after iteration {start.iteration}"
    sizes = ", ".join(f"{key} {value}" for key, value in config.shape.as_dict().items())
    rows = {
        "start": begins,
        "shape": sizes,
        "parameters": f"{axes.count_parameters(config):,}, on the fullest rank {largest:,}",
        "layout": f"TP {grid.tensor_parallel} x PP {grid.pipeline_parallel} x DP {copies}"
        + (f" x CP {contexts}" if contexts > 1 else ""),
        "memory": f"{memory / 1e9:.2f} GB a rank for weights, gradients and optimizer "
        f"({options.dtype}), activations apart",
        "data": ", ".join(f"{fact.prefix} ({fact.tokens:,} tokens)" for fact in facts),
        "steps": f"{steps:,} of {batch} x {options.seq_length} tokens, "
        f"{steps * batch * options.seq_length:,} tokens in all",
        "save": str(options.save),
    }
    rows |= lora
    rows |= _teachers(options, grid, copies, open_run_teachers(options, start, source, grid))
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())
