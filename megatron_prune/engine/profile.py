"""Time one layer, and the output layer, of models of several sizes on this machine.

Each size is a model of one layer with random weights, run as `evaluate` runs it; hooks around the
layer and the output layer take the time, so embedding and loss are not in it. Costs the weights of
one layer and one embedding, and ``repeats`` + 1 forwards a size.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from megatron_prune.engine.forward.model import LanguageModel, ModelOptions, build_model
from megatron_prune.engine.forward.weights import draw_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import ShapeError
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.planning.latency import LatencyTable, LayerTime, OutputTime
from megatron_prune.planning.search import default_multiple

_SMALL_VOCAB = 128  # where the output layer is not what is measured


def profiled_shapes(shape: ModelShape, tensor_parallel: int = 1) -> list[ModelShape]:
    """Sizes of one layer to measure: hidden at 1, 3/4 and 1/2 of the source's, FFN and heads (in
    each group, or groups where each has one head) whole and halved. At most 12."""
    step = default_multiple(shape.hidden_size)
    hidden = {max(step, shape.hidden_size * n // 4 // step * step) for n in (2, 3)}
    half = max(1, shape.ffn_hidden_size // 2 // tensor_parallel) * tensor_parallel
    groups, per_group = shape.num_query_groups, shape.heads_per_group
    fewer = (groups, max(1, per_group // 2))
    if per_group == 1:
        fewer = (max(1, groups // 2 // tensor_parallel) * tensor_parallel, 1)
    found = [
        replace(
            shape,
            num_layers=1,
            hidden_size=width,
            ffn_hidden_size=ffn,
            num_query_groups=number,
            num_attention_heads=number * each,
        )
        for width in sorted({shape.hidden_size, *hidden}, reverse=True)
        for ffn in sorted({shape.ffn_hidden_size, half}, reverse=True)
        for number, each in sorted({(groups, per_group), fewer}, reverse=True)
    ]
    for one in found:
        one.check_tensor_parallel(tensor_parallel)
    return found


def measure_table(
    config: ModelConfig,
    groups: Groups,
    options: ModelOptions,
    *,
    batch_size: int,
    repeats: int,
    progress: Callable[[str], object] = lambda what: None,
) -> LatencyTable:
    """Measure this machine.

    Args:
        repeats: timed forwards of each size, after one that is not timed; the median counts.

    Raises:
        ShapeError: pipeline stages, whose layers are no slower for it.
    """
    if groups.grid.pipeline_parallel > 1:
        raise ShapeError(
            "profile measures one layer: --pipeline-model-parallel-size has to be 1 (found "
            f"{groups.grid.pipeline_parallel})"
        )
    shapes = profiled_shapes(config.shape, groups.grid.tensor_parallel)
    layers, outputs = [], []
    for shape in shapes:
        progress(f"layer: hidden {shape.hidden_size}, {shape.num_attention_heads} heads, "
                 f"FFN {shape.ffn_hidden_size}")  # fmt: skip
        small = replace(shape, vocab_size=_SMALL_VOCAB)
        seconds, _ = _measure(replace(config, shape=small), groups, options, batch_size, repeats)
        layers.append(
            LayerTime(
                hidden=shape.hidden_size,
                heads=shape.num_attention_heads,
                groups=shape.num_query_groups,
                ffn=shape.ffn_hidden_size,
                seconds=seconds,
            )
        )
    for hidden in sorted({shape.hidden_size for shape in shapes}, reverse=True):
        progress(f"output: hidden {hidden}, vocabulary {config.shape.vocab_size}")
        smallest = replace(shapes[-1], hidden_size=hidden)
        _, seconds = _measure(replace(config, shape=smallest), groups, options, batch_size, repeats)
        outputs.append(OutputTime(hidden=hidden, vocab=config.shape.vocab_size, seconds=seconds))
    return LatencyTable(
        device=_device_name(groups),
        threads=torch.get_num_threads(),
        dtype=options.dtype,
        seq_length=options.seq_length,
        batch_size=batch_size,
        tensor_parallel=groups.grid.tensor_parallel,
        kv_channels=config.shape.kv_channels,
        layers=tuple(layers),
        outputs=tuple(outputs),
    )


def _device_name(groups: Groups) -> str:
    if groups.device.type == "cuda":
        return torch.cuda.get_device_name(groups.device)
    return f"{platform.machine()} CPU"


@torch.no_grad()
def _measure(
    config: ModelConfig, groups: Groups, options: ModelOptions, batch_size: int, repeats: int
) -> tuple[float, float]:
    """Median seconds of the layer and of the output layer."""
    model = build_model(config, groups, options)
    draw_weights(model, config, groups, seed=0)
    model.eval().to(groups.device)
    tokens = torch.arange(batch_size * options.seq_length, device=groups.device)
    tokens_bS = (tokens % config.shape.vocab_size).view(batch_size, options.seq_length)
    with _timed(model.decoder.layers[0]) as layer, _timed(model.output_layer) as output:
        for _ in range(repeats + 1):
            _forward(model, tokens_bS)
    return median(layer[1:]), median(output[1:])  # the first one warms up


def _forward(model: LanguageModel, tokens_bS: torch.Tensor) -> None:
    model(tokens_bS, None, None)


@contextmanager
def _timed(module: torch.nn.Module) -> Iterator[list[float]]:
    """Seconds of each forward of a module, appended as they happen."""
    seconds: list[float] = []
    started = 0.0

    def start(*_: Any) -> None:
        nonlocal started
        torch.cuda.synchronize()  # nothing on a CPU (`engine.cpu`)
        started = time.perf_counter()

    def stop(*_: Any) -> None:
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)

    handles = [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()
