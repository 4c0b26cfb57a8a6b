"""Qwen's first generation (``model_type`` qwen): read as Qwen2, which computes the same.

It is the family that comes with tiktoken ranks. Its tensors have names of their own, q, k and v lie
in one of them, and its configuration has other words; it is written as Qwen2, which transformers
knows without the author's code. Beyond ``seq_length`` tokens it stretches its positions and scales
its queries, which Qwen2 does not: that is the window here. (modeling_qwen.py of Qwen/Qwen-7B.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.families.names import FAMILIES
from megatron_prune.model.axes import split_layer

MODEL_TYPE, FAMILY = "qwen", "qwen2"
EMBEDDING = "transformer.wte.weight"
_OUTER = {
    "embedding.word_embeddings.weight": EMBEDDING,
    "decoder.final_layernorm.weight": "transformer.ln_f.weight",
    "output_layer.weight": "lm_head.weight",
}
_MODULES = {
    "input_layernorm": "ln_1",
    "self_attention.linear_proj": "attn.c_proj",
    "pre_mlp_layernorm": "ln_2",
    "mlp.linear_gate": "mlp.w2",
    "mlp.linear_up": "mlp.w1",
    "mlp.linear_fc2": "mlp.c_proj",
}
_THIRDS = ("self_attention.linear_q", "self_attention.linear_k", "self_attention.linear_v")
_SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range",
    "tie_word_embeddings", "torch_dtype", "dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
)  # fmt: skip


def stored(name: str) -> tuple[str, int, int]:
    """Canonical name -> the tensor it is in, and which of how many equal blocks of its rows."""
    layer, rest = split_layer(name)
    if layer is None:
        return _OUTER[rest], 0, 1
    module, _, kind = rest.rpartition(".")
    if module in _THIRDS:
        return f"transformer.h.{layer}.attn.c_attn.{kind}", _THIRDS.index(module), len(_THIRDS)
    return f"transformer.h.{layer}.{_MODULES[module]}.{kind}", 0, 1


def as_qwen2(values: Mapping[str, Any]) -> dict[str, Any]:
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
        "model_type": FAMILIES[FAMILY].model_type,
        "architectures": [FAMILIES[FAMILY].architecture],
        "hidden_act": "silu",
        "intermediate_size": values["intermediate_size"] // 2,
        "num_key_value_heads": values["num_attention_heads"],
        "head_dim": values["kv_channels"],
        "max_position_embeddings": values["seq_length"],
        "rms_norm_eps": values["layer_norm_epsilon"],
        "rope_theta": values.get("rotary_emb_base", 10000.0),
        "use_sliding_window": False,
    }
