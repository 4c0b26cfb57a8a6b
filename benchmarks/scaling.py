"""What large models cost: the tables of docs/scaling.md, from formulas alone.

  python benchmarks/scaling.py

Nothing is measured here; ``--gigabytes-per-second`` turns bytes into minutes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

from megatron_prune.families.llama import LLAMA
from megatron_prune.model.axes import axes_of, count_parameters, names, tensor_shape
from megatron_prune.model.costs import flops_at, sizes_of, weight_bytes
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.store.writer import BLOCK_BYTES


def llama(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int) -> ModelConfig:
    shape = ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=128,
        vocab_size=vocab,
    )
    return ModelConfig(family=LLAMA, shape=shape, tied=False, dtype="bf16", hf_config={})


# model -> (itself, what it is pruned to, TP x PP to train the pruned one at)
MODELS = {
    "Llama-2-7B": (
        llama(32, 4096, 11008, 32, 32, 32000),
        {
            "hidden_size": 3072,
            "ffn_hidden_size": 8256,
            "num_attention_heads": 24,
            "num_query_groups": 24,
        },
        ParallelGrid(tensor_parallel=8),
    ),
    "Llama-3-70B": (
        llama(80, 8192, 28672, 64, 8, 128256),
        {
            "hidden_size": 6144,
            "ffn_hidden_size": 21504,
            "num_attention_heads": 48,
            "num_layers": 72,
        },
        ParallelGrid(tensor_parallel=8, pipeline_parallel=4),
    ),
    "Llama-3.1-405B": (
        llama(126, 16384, 53248, 128, 8, 128256),
        {
            "hidden_size": 12288,
            "ffn_hidden_size": 39936,
            "num_attention_heads": 96,
            "num_layers": 112,
        },
        ParallelGrid(tensor_parallel=8, pipeline_parallel=16),
    ),
}


def step_bytes(config: ModelConfig) -> int:
    """The most a file-to-file step holds: three parts in flight, each of them a row-parallel tensor
    joined from its shards and its cut copy, or blocks."""
    largest = max(
        2 * tensor_shape(name, config.shape)[0] * tensor_shape(name, config.shape)[1]
        for name in names(config)
        if axes_of(name) in ("DQ", "DF")
    )
    return 3 * 2 * max(largest, BLOCK_BYTES)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes one rank holds in mixed-precision training with Adam, without activations."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def training_memory(
    config: ModelConfig, grid: ParallelGrid, *, data_parallel: int = 1, distributed: bool = True
) -> TrainingMemory:
    """Memory of the heaviest rank: 16-bit weights, fp32 gradients, fp32 master weights and Adam's
    two moments; the last three split over data-parallel ranks with the distributed optimizer
    (Rajbhandari et al. 2020, arXiv:1910.02054, stage 1)."""
    shape = config.shape
    padded = replace(shape, vocab_size=padded_vocab_size(shape.vocab_size, grid.tensor_parallel))
    whole = count_parameters(replace(config, shape=padded))
    outer = padded.vocab_size * shape.hidden_size * (1 if config.tied else 2)
    layers = max(grid.layers_per_stage(shape.num_layers)) / shape.num_layers
    edge = outer if grid.pipeline_parallel == 1 else padded.vocab_size * shape.hidden_size
    mine = int(((whole - outer) * layers + edge) / grid.tensor_parallel)
    share = data_parallel if distributed else 1
    return TrainingMemory(parameters=2 * mine, gradients=4 * mine, optimizer=12 * mine // share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes-per-second", type=float, default=1.0)
    rate = parser.parse_args().gigabytes_per_second * 1e9
    print("| model | parameters | pruned | GB read | GB written | minutes | step holds at most |")
    print("|---|---|---|---|---|---|---|")
    for name, (config, sizes, _) in MODELS.items():
        pruned = replace(config, shape=replace(config.shape, **sizes))
        read, written = weight_bytes(config), weight_bytes(pruned)
        print(
            f"| {name} | {count_parameters(config) / 1e9:.1f} B "
            f"| {count_parameters(pruned) / 1e9:.1f} B | {read / 1e9:.0f} | {written / 1e9:.0f} "
            f"| {(read + written) / rate / 60:.1f} | {step_bytes(config) / 2**20:.0f} MiB |"
        )
    print()
    print(
        "| pruned from | TP x PP x DP | weights | gradients | optimizer | GB a rank | PFLOP/Btok |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, (config, sizes, grid) in MODELS.items():
        pruned = replace(config, shape=replace(config.shape, **sizes))
        for data_parallel in (1, 8):
            memory = training_memory(pruned, grid, data_parallel=data_parallel)
            flops = 3 * flops_at(pruned, sizes_of(pruned.shape), 4096) * 1e9 / 1e15
            print(
                f"| {name} | {grid.tensor_parallel} x {grid.pipeline_parallel} x {data_parallel} "
                f"| {memory.parameters / 1e9:.1f} | {memory.gradients / 1e9:.1f} "
                f"| {memory.optimizer / 1e9:.1f} | {memory.total / 1e9:.1f} | {flops:,.0f} |"
            )


if __name__ == "__main__":
    main()
