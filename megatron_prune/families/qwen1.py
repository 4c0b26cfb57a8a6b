"""Qwen's first generation (``model_type`` qwen): read as Qwen2, which computes the same.

It is the family that comes with tiktoken ranks. Its tensors have names of their own, q, k and v lie
in one of them, and its configuration has other words; it is written as Qwen2, which transformers
knows without the author's code. Beyond ``seq_length`` tokens it stretches its positions and scales
its queries, which Qwen2 does not: that is the window here. (modeling_qwen.py of Qwen/Qwen-7B.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.families.qwen2 import QWEN2
from megatron_prune.model.blocks import renamed
from megatron_prune.model.shape import ModelConfig

_MODULES = {
    "embedding.word_embeddings": "transformer.wte",
    "decoder.final_layernorm": "transformer.ln_f",
    "output_layer": "lm_head",
    "input_layernorm": "ln_1",
    "self_attention.linear_q": "attn.c_attn",
    "self_attention.linear_k": "attn.c_attn",
    "self_attention.linear_v": "attn.c_attn",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_gate": "mlp.w2",
    "mlp.linear_up": "mlp.w1",
    "mlp.linear_fc2": "mlp.c_proj",
}
_THIRDS = {f"self_attention.linear_{part}": (i, 3) for i, part in enumerate("qkv")}
_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range",
    "tie_word_embeddings", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def _as_qwen2(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a Qwen2 that computes the same up to ``seq_length`` tokens.

    Raises:
        CheckpointError: biases or part of the channels rotated, which Qwen2 cannot say.
        KeyError: a size is missing.
    """
    for key, wanted in (("no_bias", True), ("rotary_pct", 1.0), ("scale_attn_weights", True)):
        if values.get(key, wanted) != wanted:
            raise CheckpointError(f"{key} is {values[key]!r}; wanted {wanted}, as Qwen2 computes")
    return {
        **{key: values[key] for key in _SAME if key in values},
        "model_type": QWEN2.model_type,
        "architectures": [QWEN2.architecture],
        "hidden_act": "silu",
        "intermediate_size": values["intermediate_size"] // 2,
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": values["kv_channels"],
        "max_position_embeddings": values["seq_length"],
        "rms_norm_eps": values["layer_norm_epsilon"],
        "rope_theta": values.get("rotary_emb_base", 10000.0),
        "use_sliding_window": False,
    }


def _read(values: Mapping[str, Any]) -> ModelConfig:
    return QWEN2.read(_as_qwen2(values))


QWEN1 = replace(
    QWEN2,
    model_type="qwen",
    layer=renamed(QWEN2.layer, _MODULES, _THIRDS),
    outer=renamed(QWEN2.outer, _MODULES, {}),
    hf_layers="transformer.h",
    read=_read,
)
"""How it lies on disk; what is read from it is a model of family qwen2."""
