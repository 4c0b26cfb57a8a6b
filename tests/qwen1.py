"""Models of Qwen's first generation as its authors lay them out, made of transformers' Qwen2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.pico import make_model

_OUTER = {
    "model.embed_tokens.weight": "transformer.wte.weight",
    "model.norm.weight": "transformer.ln_f.weight",
    "lm_head.weight": "lm_head.weight",
}
_INNER = {
    "input_layernorm": "ln_1",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
}


def _renamed(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    found = {new: tensors[old] for old, new in _OUTER.items()}
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"transformer.h.{layer}"
        for kind in ("weight", "bias"):
            parts = [tensors[f"{ours}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{theirs}.attn.c_attn.{kind}"] = torch.cat(parts)
        for old, new in _INNER.items():
            found[f"{theirs}.{new}.weight"] = tensors[f"{ours}.{old}.weight"]
    return found


def make_qwen1(folder: Path, twin: Path, vocab_size: int, end: int) -> Path:
    """The model in ``folder``, without a tokenizer; the Qwen2 that computes the same in ``twin``.

    Args:
        end: the id that ends a text.
    """
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 6}
    make_model(twin, "qwen", vocab_size=vocab_size, eos_token_id=end, **sizes)
    values: dict[str, Any] = json.loads((twin / "config.json").read_text())
    folder.mkdir()
    config = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "bf16": False,
        "hidden_size": values["hidden_size"],
        "intermediate_size": 2 * values["intermediate_size"],
        "initializer_range": 0.02,
        "kv_channels": values["hidden_size"] // values["num_attention_heads"],
        "layer_norm_epsilon": values["rms_norm_eps"],
        "max_position_embeddings": 8192,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": values["num_attention_heads"],
        "num_hidden_layers": values["num_hidden_layers"],
        "rotary_emb_base": 50000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": values["max_position_embeddings"],
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": vocab_size,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"eos_token_id": end, "pad_token_id": end, "stop_words_ids": [[end]]}
    (folder / "generation_config.json").write_text(json.dumps({"chat_format": "raw", **generation}))
    tensors = _renamed(load_file(twin / "model.safetensors"), values["num_hidden_layers"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
