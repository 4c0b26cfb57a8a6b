"""Layers of different FFN widths in config.json, as Nemotron-NAS (DeciLM) models have them.

``block_configs`` holds one entry a layer. What serves such models reads a layer's width from
``ffn_mult``, and rounds it up to a multiple of 256; vLLM alone reads ``intermediate_size`` when
there is no ``ffn_mult`` (read in their sources, 2026-11: vLLM and SGLang ``nemotron_nas.py``,
TensorRT-LLM ``modeling_nemotron_nas.py``, llama.cpp ``DeciModel``, mlx-lm ``nemotron-nas.py``). So
``ffn_mult`` is written where every width comes back exactly from it, else ``intermediate_size``.

transformers loads such a model by `decilm`, the code that is written beside it; so do vLLM, SGLang
and TensorRT-LLM, which want ``block_configs`` as objects with attributes.

Reading takes both, and refuses what else such models have: layers without attention or FFN, linear
layers in their place, query groups that differ between layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from megatron_prune.errors import CheckpointError
from megatron_prune.model.shape import ModelShape

MODEL_TYPE, ARCHITECTURE = "nemotron-nas", "DeciLMForCausalLM"
CODE = "decilm.py"
FAMILY = "llama"  # whose modules these models have, with other sizes
AUTO_MAP = {"AutoConfig": "decilm.DeciLMConfig", "AutoModelForCausalLM": "decilm.DeciLMForCausalLM"}
FFN_MULTIPLE = 256  # of all widths that an ffn_mult can say


def code() -> bytes:
    """The text of `decilm`, which is never imported here."""
    return Path(__file__).with_name(CODE).read_bytes()


def width_of(ffn_mult: float, hidden_size: int) -> int:
    """FFN channels of an ``ffn_mult``, by the one formula of all its readers."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return -(-width // FFN_MULTIPLE) * FFN_MULTIPLE


def says_ffn_mult(shape: ModelShape) -> bool:
    """Whether every layer's width can be said as ``ffn_mult``."""
    return all(width % FFN_MULTIPLE == 0 for width in shape.ffn_widths)


def block_configs(shape: ModelShape) -> list[dict[str, Any]]:
    """``block_configs`` of a shape; no keys but those all readers know."""
    attention = {"n_heads_in_group": shape.heads_per_group}
    as_mult, found = says_ffn_mult(shape), []
    for width in shape.ffn_widths:
        mult = round(3 * width / (2 * shape.hidden_size), 6)  # as mlx-lm rounds it
        assert not as_mult or width_of(mult, shape.hidden_size) == width, (width, mult)
        ffn = {"ffn_mult": mult} if as_mult else {"intermediate_size": width}
        absent = {"no_op": False, "replace_with_linear": False}
        found.append({"attention": {**attention, **absent}, "ffn": {**ffn, **absent}})
    return found


def width_keys(shape: ModelShape) -> dict[str, Any]:
    """What config.json says of layers of different widths."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "auto_map": AUTO_MAP,
        "block_configs": block_configs(shape),
    }


def read_block_configs(values: Mapping[str, Any]) -> tuple[tuple[int, ...], int]:
    """FFN channels of every layer, and query groups, of a config.json.

    Raises:
        CheckpointError: a layer is of a kind that we do not read.
    """
    blocks, heads = values["block_configs"], values["num_attention_heads"]
    if len(blocks) != values["num_hidden_layers"]:
        raise CheckpointError(
            f"block_configs has {len(blocks)} layers, num_hidden_layers says "
            f"{values['num_hidden_layers']}; one of the two belongs to another model"
        )
    widths, per_group = [], set()
    for layer, block in enumerate(blocks):
        for part in ("attention", "ffn"):
            odd = [key for key, value in block[part].items() if value and key not in _READ]
            if odd:
                raise CheckpointError(
                    f"block_configs[{layer}].{part} has {odd[0]} {block[part][odd[0]]!r}; this "
                    "reads layers that differ in FFN channels alone"
                )
        widths.append(_width(block["ffn"], values["hidden_size"], layer))
        per_group.add(block["attention"]["n_heads_in_group"])
    found = sorted(per_group)
    if len(found) != 1 or heads % found[0]:
        raise CheckpointError(
            f"block_configs: layers have {found} heads in a group, of {heads} heads; this reads "
            "one number of query groups for all layers"
        )
    return tuple(widths), heads // found[0]


_READ = {"n_heads_in_group", "ffn_mult", "intermediate_size", "hidden_act"}


def _width(ffn: Mapping[str, Any], hidden_size: int, layer: int) -> int:
    if ffn.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"block_configs[{layer}].ffn: {ffn['hidden_act']}; wanted silu")
    mult, width = ffn.get("ffn_mult"), ffn.get("intermediate_size")
    said = None if mult is None else width_of(mult, hidden_size)
    if len({said, width} - {None}) != 1:
        raise CheckpointError(
            f"block_configs[{layer}].ffn: ffn_mult {mult!r} and intermediate_size {width!r} say no "
            "width, or two; wanted one of the two keys"
        )
    return cast("int", width if said is None else said)  # the shape refuses what is no size
