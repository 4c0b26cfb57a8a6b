"""What a model costs: parameters, bytes, FLOPs, training memory. Formulas only.

Counts follow the axis table, so they hold for every shape, pruned or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_prune.axes import count_parameters
from megatron_prune.grid import ParallelGrid, padded_vocab_size
from megatron_prune.shape import ModelConfig

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the weights in the model's dtype."""
    return count_parameters(config) * DTYPE_BYTES[config.dtype]


def flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Forward multiply-adds x 2 per token: every matrix, and causal attention over half a sequence.

    Training costs three times this (Kaplan et al. 2020, arXiv:2001.08361, eq. 2.2).
    """
    shape = config.shape
    per_layer = (
        shape.hidden_size
        * shape.kv_channels
        * (2 * shape.num_attention_heads + 2 * shape.num_query_groups)
        + 3 * shape.hidden_size * shape.ffn_hidden_size
    )
    attention = shape.num_attention_heads * shape.kv_channels * seq_length  # q.k and p.v, halved
    return 2 * (shape.num_layers * (per_layer + attention) + shape.vocab_size * shape.hidden_size)


def kv_cache_bytes_per_token(config: ModelConfig) -> int:
    """Bytes that one token of context takes while generating."""
    shape = config.shape
    width = shape.num_query_groups * shape.kv_channels
    return 2 * shape.num_layers * width * DTYPE_BYTES[config.dtype]


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
