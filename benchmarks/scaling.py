"""What large models cost: the tables of docs/scaling.md, from formulas alone.

  python benchmarks/scaling.py
  python benchmarks/scaling.py --measure wanda sparsegpt alps

``--gigabytes-per-second`` turns bytes into minutes. Nothing is measured but with ``--measure``: it
makes one layer of the shape of a 1B sparse, in a process for each method, on random weights and
tokens, and shows the peak of private memory above what the process had before beside the formula.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_prune.families.llama import LLAMA
from megatron_prune.model.axes import (
    axes_of,
    count_parameters,
    layer_name,
    names,
    split_dim,
    tensor_shape,
)
from megatron_prune.model.costs import flops_at, sizes_of, weight_bytes
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.sources.source import Source
from megatron_prune.store.writer import BLOCK_BYTES

if TYPE_CHECKING:  # the tables are printed without megatron-core
    from megatron_prune.engine.groups import Groups


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


@dataclass(frozen=True, kw_only=True)
class MethodMemory:
    """What a method of `sparsify` holds, read off its code.

    Attributes:
        has_gram: whether there are second moments.
        preparing: bytes per ``I^2`` on the first rank while it prepares, beyond the second moments.
        kept: bytes per ``I^2`` on every rank while rows are pruned.
        group, matrix: float32 copies of this rank's rows, of all matrices that share an input and
            of the one that is worked on.
    """

    has_gram: bool
    preparing: float
    kept: float
    group: float
    matrix: float


SPARSIFY = {
    "wanda": MethodMemory(has_gram=False, preparing=0, kept=0, group=2, matrix=6),
    # scaled, turned, damped, factor, its inverse, the inverse turned; factor and its unit triangle
    "sparsegpt": MethodMemory(has_gram=True, preparing=24, kept=8, group=3, matrix=6),
    # moments, copy and ridge; factors and inverse of float64
    "admm": MethodMemory(has_gram=True, preparing=32, kept=8, group=2, matrix=11),
    # moments; float64: them, the vectors, and twice as much for LAPACK's divide and conquer
    "alps": MethodMemory(has_gram=True, preparing=36, kept=8, group=2, matrix=12.5),
}


@dataclass(frozen=True, kw_only=True)
class SparsifyMemory:
    """Bytes one rank of `sparsify` holds beyond the layer and the hidden states, at its worst.

    Attributes:
        statistics: the sums of all inputs of a layer, and one window's product.
        preparing: on the first rank; other ranks wait with the second moments of one input.
        pruning: second moments, what was prepared of them, and rows.
    """

    statistics: int
    preparing: int
    pruning: int

    @property
    def first_rank(self) -> int:
        return max(self.statistics, self.preparing, self.pruning)

    @property
    def other_rank(self) -> int:
        return max(self.statistics, self.pruning)


def sparsify_memory(
    config: ModelConfig, method: str, *, tensor_parallel: int = 1, ranks: int = 1
) -> SparsifyMemory:
    """Memory of the prune step; inputs are worked on one after the other, in the order of a layer,
    and the sums of those that wait stay.

    Args:
        ranks: all of the launch, over which rows are dealt.
    """
    facts, shape = SPARSIFY[method], config.shape
    waiting, found = 0.0, [(0.0, 0.0)]
    widest = 0
    for half in reversed(config.family.halves):
        for modules in ((half.output,), half.inputs):
            sizes = [tensor_shape(layer_name(0, f"{m}.weight"), shape) for m in modules]
            square, widest = sizes[0][1] ** 2, max(widest, sizes[0][1])
            gram = 4 * square if facts.has_gram else 0
            rows = [-(-height // ranks) * width * 4 for height, width in sizes]
            work = facts.group * sum(rows) + facts.matrix * max(rows)
            preparing = gram + facts.preparing * square
            found.append((waiting + preparing, waiting + gram + facts.kept * square + work))
            waiting += 8 * square / tensor_parallel if facts.has_gram else 0
    product = 4 * widest**2 / tensor_parallel if facts.has_gram else 0
    return SparsifyMemory(
        statistics=int(waiting + product),
        preparing=int(max(preparing for preparing, _ in found)),
        pruning=int(max(pruning for _, pruning in found)),
    )


ONE_B = ModelShape(
    num_layers=1,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=64,
    vocab_size=1024,
)
"""A layer of Llama-3.2-1B."""

WINDOWS, TOKENS = 4, 256  # to calibrate on


def layer_and_states_bytes(config: ModelConfig, windows: int, tokens: int) -> int:
    """One layer at TP=1 and the hidden states of all windows, in the model's dtype of two bytes."""
    shape = config.shape
    outer = shape.vocab_size * shape.hidden_size * (1 if config.tied else 2)
    layer = (count_parameters(config) - outer) // shape.num_layers
    return 2 * layer + 2 * windows * tokens * shape.hidden_size


def measured_bytes(method: str) -> tuple[int, float]:
    """Peak private bytes of `sparsify` to 2:4 above those before it, and its CPU seconds; in a
    process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (method,))


def _measure(name: str) -> tuple[int, float]:
    torch.set_num_threads(1)
    from megatron_prune.engine.groups import model_parallel

    with model_parallel(ParallelGrid()) as groups:
        _sparsify(_Noise(replace(ONE_B, hidden_size=64, ffn_hidden_size=64)), name, groups)
        before, began = _private_bytes(), time.process_time()
        with _Peak() as peak:
            _sparsify(_Noise(ONE_B), name, groups)
        return peak.bytes - before, time.process_time() - began


def _sparsify(source: Source, name: str, groups: Groups) -> None:
    from megatron_prune.engine.forward.model import ModelOptions
    from megatron_prune.engine.sparsify import Calibration, Task, sparsify
    from megatron_prune.sources.replaced import Tensors
    from megatron_prune.sparsity.method import Asked, How, Pattern, method_for

    asked = Asked(share=0.5, pattern=Pattern(keep=2, group=4))
    task = Task(
        method=method_for(name, How()), how=How(), asked=[asked], targets=[*names(source.config)]
    )
    windows = torch.randint(source.config.shape.vocab_size, (WINDOWS, TOKENS))
    calibration = Calibration(
        windows_WS=windows, model=ModelOptions(seq_length=TOKENS, dtype="bf16")
    )
    with tempfile.TemporaryDirectory() as folder:
        sparsify(source, task, calibration, groups, Tensors(Path(folder)))


class _Peak:
    """The most private bytes of this process, sampled every 5 ms while the block runs."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.bytes = max(self.bytes, _private_bytes())

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()


def _private_bytes() -> int:
    """RssAnon of this process."""
    text = Path("/proc/self/status").read_text()
    line = next(x for x in text.splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class _Noise(Source):
    """A model of random weights, made anew whenever they are read."""

    def __init__(self, shape: ModelShape) -> None:
        self.config = ModelConfig(family=LLAMA, shape=shape, tied=False, dtype="bf16", hf_config={})
        self.path, self.format, self.companion_files = Path("noise"), "noise", {}

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape = tensor_shape(name, self.config.shape)
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        whole = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        dim = split_dim(axes_of(name))
        if dim is None or stop is None:
            return whole
        rows = self.config.shape.rows(axes_of(name)[dim])
        return whole.narrow(dim, start * rows, (stop - start) * rows)


def show_sparsify(models: Mapping[str, ModelConfig]) -> None:
    """The table of `sparsify_memory`."""
    print("\n| model | method | TP, ranks | statistics | preparing, first rank | pruning |")
    print("|---|---|---|---|---|---|")
    for name, config in models.items():
        for method in SPARSIFY:
            for tp, ranks in ((1, 1), (8, 8), (8, 64)):
                found = sparsify_memory(config, method, tensor_parallel=tp, ranks=ranks)
                cells = (found.statistics, found.preparing, found.pruning)
                print(
                    f"| {name} | {method} | {tp}, {ranks} | "
                    + " | ".join(f"{x / 1e9:.1f}" for x in cells)
                    + " |"
                )


def show_measured(methods: list[str]) -> None:
    """Measured beside the formula, at the shape of a 1B."""
    config = _Noise(ONE_B).config
    outside = layer_and_states_bytes(config, WINDOWS, TOKENS)
    print("| method | formula, MB | with layer and hidden states | measured, MB | CPU seconds |")
    print("|---|---|---|---|---|")
    for method in methods:
        formula = sparsify_memory(config, method).first_rank
        peak, seconds = measured_bytes(method)
        print(
            f"| {method} | {formula / 1e6:.0f} | {(formula + outside) / 1e6:.0f} "
            f"| {peak / 1e6:.0f} | {seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes-per-second", type=float, default=1.0)
    parser.add_argument("--measure", nargs="+", choices=SPARSIFY, metavar="METHOD", default=[])
    args = parser.parse_args()
    if args.measure:
        show_measured(args.measure)
        return
    rate = args.gigabytes_per_second * 1e9
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
    show_sparsify({name: config for name, (config, _, _) in MODELS.items()})


if __name__ == "__main__":
    main()
