"""Model families, and what canonical tensors are called on disk. Tables only.

A new LLaMA-like family is one row of `FAMILIES`. Hugging Face's names are the same for all of them;
Megatron's differ by layer spec: Transformer Engine fuses the norms into the linears that follow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_prune.model.axes import layer_name, split_layer


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets one family apart.

    Attributes:
        model_type: Hugging Face's ``model_type``.
        architecture: Hugging Face's causal-LM class.
        qkv_bias: ``linear_qkv`` has a bias in every model of the family.
        hidden_multiple_of_heads: transformers (5.x) refuses a config.json whose hidden_size is not
            a multiple of its heads, though ``head_dim`` is given.
        defaults: what transformers assumes for keys that config.json leaves out.
    """

    model_type: str
    architecture: str
    qkv_bias: bool = False
    hidden_multiple_of_heads: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


FAMILIES = {
    "llama": Family(
        model_type="llama", architecture="LlamaForCausalLM", hidden_multiple_of_heads=True
    ),
    "mistral": Family(
        model_type="mistral",
        architecture="MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family(
        model_type="qwen2",
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        defaults={"num_key_value_heads": 32},
    ),
}

_HF_OUTER = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_HF_MODULES = {
    "input_layernorm": "input_layernorm",
    "self_attention.linear_q": "self_attn.q_proj",
    "self_attention.linear_k": "self_attn.k_proj",
    "self_attention.linear_v": "self_attn.v_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "mlp.linear_gate": "mlp.gate_proj",
    "mlp.linear_up": "mlp.up_proj",
    "mlp.linear_fc2": "mlp.down_proj",
}
# Tensors that older exports carry and no model needs.
HF_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def hf_name(name: str) -> str:
    """Canonical name -> Hugging Face's."""
    layer, rest = split_layer(name)
    if layer is None:
        return _HF_OUTER[rest]
    module, _, kind = rest.rpartition(".")
    return f"model.layers.{layer}.{_HF_MODULES[module]}.{kind}"


_FUSED = {
    "self_attention.linear_q": ("self_attention.linear_qkv", "q"),
    "self_attention.linear_k": ("self_attention.linear_qkv", "k"),
    "self_attention.linear_v": ("self_attention.linear_qkv", "v"),
    "mlp.linear_gate": ("mlp.linear_fc1", "gate"),
    "mlp.linear_up": ("mlp.linear_fc1", "up"),
}
# Transformer Engine's names of the norms. Distributed checkpoints use them for every layer spec.
TE_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
# Modules that carry an (empty) `_extra_state` entry, which readers ask for. TE's attention too.
LINEARS = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
TE_ATTENTION = "self_attention.core_attention"


def megatron_name(rest: str, *, te_norms: bool) -> tuple[str, str]:
    """Canonical name without its layer -> Megatron's stored name and the part of it: q, k, v,
    gate, up, or the empty string for a tensor that is stored by itself."""
    if te_norms and rest in TE_NORMS:
        return TE_NORMS[rest], ""
    module, _, kind = rest.rpartition(".")
    if module in _FUSED:
        fused, part = _FUSED[module]
        return f"{fused}.{kind}", part
    return rest, ""


def in_layer(layer: int | None, rest: str) -> str:
    """The full name of a stored tensor."""
    return rest if layer is None else layer_name(layer, rest)
