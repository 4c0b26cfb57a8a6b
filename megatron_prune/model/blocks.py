"""What families are made of: attention, MLP, embedding and norms, as tables of named axes.

This is the only place that says which dim of which tensor is what (`shape.AXES` has the letters).
Canonical names are Megatron's, with its fused tensors taken apart (``linear_q``, ``linear_gate``);
`fusion` knows how they lie in those. Hugging Face's names are those of Llama, which most families
have; a family with others changes them (`renamed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_prune.model.family import Half, Weight

ATTENTION = Half(
    module="self_attention",
    norm="input_layernorm",
    readers=("linear_q", "linear_k", "linear_v"),
    projection="linear_proj",
    axis="Q",
)
MLP = Half(
    module="mlp",
    norm="pre_mlp_layernorm",
    readers=("linear_gate", "linear_up"),
    projection="linear_fc2",
    axis="F",
)
HALVES = (ATTENTION, MLP)

EMBEDDING = Weight(
    name="embedding.word_embeddings.weight", axes="VD", hf="model.embed_tokens.weight"
)
FINAL_NORM = Weight(name="decoder.final_layernorm.weight", axes="D", hf="model.norm.weight")
OUTPUT = Weight(name="output_layer.weight", axes="VD", hf="lm_head.weight", when="untied")
OUTER = (EMBEDDING, FINAL_NORM, OUTPUT)


def _linear(name: str, axes: str, hf: str, bias_when: str) -> tuple[Weight, Weight]:
    """A linear's weight, and its bias along the rows."""
    return (
        Weight(name=f"{name}.weight", axes=axes, hf=f"{hf}.weight"),
        Weight(name=f"{name}.bias", axes=axes[0], hf=f"{hf}.bias", when=bias_when),
    )


def attention(*, qk_norm: bool = False) -> tuple[Weight, ...]:
    """Attention and the norm before it.

    Args:
        qk_norm: every head's queries and keys are normalised; all heads share the weights.
    """
    q, k, v = (
        _linear(f"self_attention.linear_{x}", axes, f"self_attn.{x}_proj", "qkv_bias")
        for x, axes in (("q", "QD"), ("k", "KD"), ("v", "KD"))
    )
    norms = tuple(
        Weight(
            name=f"self_attention.{x}_layernorm.weight", axes="C", hf=f"self_attn.{x}_norm.weight"
        )
        for x in "qk"
    )
    return (
        Weight(name="input_layernorm.weight", axes="D", hf="input_layernorm.weight"),
        *(weight for weight, _ in (q, k, v)),
        *(bias for _, bias in (q, k, v)),
        *(norms if qk_norm else ()),
        *_linear("self_attention.linear_proj", "DQ", "self_attn.o_proj", "proj_bias"),
    )


def gated_mlp() -> tuple[Weight, ...]:
    """An MLP whose activation is multiplied by a second projection, and the norm before it."""
    gate, up = (
        _linear(f"mlp.linear_{x}", "FD", f"mlp.{x}_proj", "mlp_bias") for x in ("gate", "up")
    )
    return (
        Weight(name="pre_mlp_layernorm.weight", axes="D", hf="post_attention_layernorm.weight"),
        gate[0], up[0], gate[1], up[1],
        *_linear("mlp.linear_fc2", "DF", "mlp.down_proj", "mlp_bias"),
    )  # fmt: skip


KNOWN = (*attention(qk_norm=True), *gated_mlp(), *OUTER)
"""Every weight that a family may have."""


def renamed(
    weights: tuple[Weight, ...], modules: Mapping[str, str], blocks: Mapping[str, tuple[int, int]]
) -> tuple[Weight, ...]:
    """The weights under other names in Hugging Face's files.

    Args:
        modules: canonical module -> Hugging Face's.
        blocks: canonical module -> which of how many equal blocks of rows it is.
    """

    def one(weight: Weight) -> Weight:
        module, _, kind = weight.name.rpartition(".")
        return replace(weight, hf=f"{modules[module]}.{kind}", hf_block=blocks.get(module, (0, 1)))

    return tuple(one(weight) for weight in weights)
