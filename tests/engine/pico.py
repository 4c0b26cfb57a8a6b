"""Small models and a source that reads them from memory, for the engine's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from megatron_prune import axes
from megatron_prune.grid import ParallelGrid
from megatron_prune.shape import ModelConfig, ModelShape
from megatron_prune.source import Source
from megatron_prune.store.names import hf_name

BASE = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "vocab_size": 379,  # a prime: every tensor-parallel size pads it
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 6},
    "four": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6},  # TP=2, 4
    "attention_bias": {"attention_bias": True},
    "all_bias": {"attention_bias": True, "mlp_bias": True},
    "llama3": {"rope_parameters": LLAMA3},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    "qwen": {},
}


def hf_model(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random model with weights large enough that every part of it matters."""
    values = {**BASE, **KINDS[kind]}
    if kind == "qwen":
        del values["head_dim"]
        config: Any = Qwen2Config(**values)
    else:
        config = LlamaConfig(**values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1.0 if "norm" in name else 0.0))
    return model.eval()


class MemorySource(Source):
    """A transformers model as a source."""

    format = "hf"

    def __init__(self, model: PreTrainedModel) -> None:
        c: Any = model.config
        rope = dict(c.rope_parameters)
        base = rope.pop("rope_theta")
        is_qwen = c.model_type == "qwen2"
        head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.path, self.grid, self.companion_files = Path("memory"), ParallelGrid(), {}
        self.config = ModelConfig(
            family=c.model_type,
            shape=ModelShape(
                num_layers=c.num_hidden_layers,
                hidden_size=c.hidden_size,
                ffn_hidden_size=c.intermediate_size,
                num_attention_heads=c.num_attention_heads,
                num_query_groups=c.num_key_value_heads,
                kv_channels=head_dim,
                vocab_size=c.vocab_size,
            ),
            tied=c.tie_word_embeddings,
            qkv_bias=is_qwen or c.attention_bias,
            proj_bias=not is_qwen and c.attention_bias,
            mlp_bias=not is_qwen and c.mlp_bias,
            norm_epsilon=c.rms_norm_eps,
            rotary_base=base,
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            max_position_embeddings=c.max_position_embeddings,
            hf_config=c.to_dict(),
        )
        self._tensors = model.state_dict()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._tensors[hf_name(name)]
        letters = axes.axes_of(name)
        dim = axes.split_dim(letters)
        if dim is None or stop is None:
            return tensor
        rows = self.config.shape.rows(letters[dim])
        return tensor.narrow(dim, start * rows, (stop - start) * rows)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[hf_name(name)].dtype
