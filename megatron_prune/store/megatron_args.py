"""The ``args`` namespace of a Megatron checkpoint: written for stock Megatron-LM's
``--use-checkpoint-args``, read when nothing else tells what the model is.
"""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.errors import CheckpointError, PruneError
from megatron_prune.families import FAMILIES, family_of_arguments
from megatron_prune.families.windows import windowed_layers
from megatron_prune.model.family import Family
from megatron_prune.model.grid import ParallelGrid, padded_vocab_size
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.store.stock_arguments import check_function


def megatron_args(config: ModelConfig, grid: ParallelGrid, **more: Any) -> Namespace:
    """Arguments that describe a model to stock Megatron-LM (core_r0.16); plain types only."""
    shape = config.shape
    scaling = dict(config.rope_scaling or {})
    values: dict[str, Any] = {
        **{k: v for k, v in shape.as_dict().items() if k != "vocab_size"},
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": padded_vocab_size(shape.vocab_size, grid.tensor_parallel),
        "make_vocab_size_divisible_by": 128,
        "group_query_attention": True,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": "rope",
        "add_position_embedding": True,
        "use_rotary_position_embeddings": True,
        "rotary_base": int(config.rotary_base),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": scaling.get("rope_type") == "llama3",
        "rope_scaling_factor": float(scaling.get("factor", 8.0)),
        "rotary_seq_len_interpolation_factor": (
            scaling["factor"] if scaling.get("rope_type") == "linear" else None
        ),
        "window_attn_skip_freq": _skip_freq(config),
        "window_size": None if config.sliding_window is None else (config.sliding_window - 1, 0),
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.qkv_bias,
        "swiglu": config.family.is_gated and config.family.activation == "silu",
        "squared_relu": False,
        "untie_embeddings_and_output_weights": not config.tied,
        "normalization": config.family.norm,
        "norm_epsilon": config.norm_epsilon,  # to core_r0.15
        "layernorm_epsilon": config.norm_epsilon,  # from core_r0.16
        "apply_layernorm_1p": False,
        "qk_layernorm": config.family.has_qk_norm,
        "apply_query_key_layer_scaling": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "init_method_std": config.init_method_std,
        "num_experts": None,
        "bf16": config.dtype == "bf16",
        "fp16": config.dtype == "fp16",
        "tensor_model_parallel_size": grid.tensor_parallel,
        "pipeline_model_parallel_size": grid.pipeline_parallel,
        "decoder_first_pipeline_num_layers": grid.first_stage_layers,
        "decoder_last_pipeline_num_layers": grid.last_stage_layers,
        "virtual_pipeline_model_parallel_size": None,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "model_family": config.family.name,
        **more,
    }
    return Namespace(**values)


STOCK_ROPE_SCALING = {  # megatron.core RotaryEmbedding; --rope-scaling-factor never reaches it
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def stock_flags(config: ModelConfig) -> list[str]:
    """What ``--use-checkpoint-args`` does not take from a checkpoint and this model depends on.

    Without them stock Megatron-LM loads the weights and computes something else, silently.
    """
    flags = [] if config.norm_epsilon == 1e-5 else [f"--norm-epsilon {config.norm_epsilon:g}"]
    if dict(config.rope_scaling or {}) == STOCK_ROPE_SCALING:
        flags.append("--use-rope-scaling")
    if config.sliding_window is not None:
        flags.append(f"--window-size {config.sliding_window - 1},0")
    if skips := _skip_freq(config):
        flags.append(f"--window-attn-skip-freq '[{','.join(map(str, skips))}]'")
    if config.dtype in ("bf16", "fp16"):
        flags.append(f"--{config.dtype}")
    return flags


def _skip_freq(config: ModelConfig) -> list[int] | None:
    """A 1 for each layer with the window and a 0 for each without, where layers differ."""
    if config.sliding_window is None or not config.hf_config.get("use_sliding_window"):
        return None
    windowed = windowed_layers({**config.hf_config, "num_hidden_layers": config.shape.num_layers})
    return None if all(windowed) else [int(has) for has in windowed]


def beyond_stock(config: ModelConfig) -> list[str]:
    """What of this model stock Megatron-LM's ``pretrain_gpt.py`` has no argument for."""
    found = []
    if config.rope_scaling is not None and dict(config.rope_scaling) != STOCK_ROPE_SCALING:
        found.append(f"rope scaling {dict(config.rope_scaling)}")
    if config.rotary_base != int(config.rotary_base):
        found.append(f"the fractional rope base {config.rotary_base}")
    return found


def config_from_args(args: Any, where: Path, family: str | None) -> ModelConfig:
    """A model's facts from a stock checkpoint's arguments.

    Raises:
        CheckpointError: an attribute is missing, or the model is of a kind we do not read.
    """
    values = vars(args) if isinstance(args, Namespace) else {}
    unknown = check_function(_not_ours(values), f"{where}: args.")
    if unknown and "model_family" not in values:
        warnings.warn(
            f"{where}: nobody here knows what these arguments do, and they are not read: "
            f"{', '.join(unknown)}; if one of them changes what the model computes, what is made "
            "of it is another model",
            stacklevel=2,
        )
    required = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")
    missing = [name for name in required if not isinstance(values.get(name), int)]
    if "padded_vocab_size" not in values and "vocab_size" not in values:
        missing.append("padded_vocab_size")
    if missing:
        raise CheckpointError(
            f"{where}: its arguments lack {', '.join(missing)}, so its shape is not known; "
            "convert it again from the Hugging Face source"
        )
    heads = values["num_attention_heads"]
    grouped = values.get("group_query_attention") and values.get("num_query_groups")
    all_bias = bool(values.get("add_bias_linear"))
    qkv_bias = bool(values.get("add_qkv_bias")) or all_bias
    window = _sliding_window(values, where)
    like = family_of_arguments(
        qkv_bias=qkv_bias,
        all_bias=all_bias,
        window=window is not None,
        qk_norm=bool(values.get("qk_layernorm")),
    )
    found = _family(values, where, family, like)
    try:
        shape = ModelShape(
            num_layers=values["num_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["ffn_hidden_size"],
            num_attention_heads=heads,
            num_query_groups=values["num_query_groups"] if grouped else heads,
            kv_channels=values.get("kv_channels") or values["hidden_size"] // heads,
            vocab_size=_vocab_size(values),
        )
    except PruneError as error:
        raise CheckpointError(f"{where}: its arguments: {error}") from None
    return ModelConfig(
        family=found,
        shape=shape,
        tied=not values.get("untie_embeddings_and_output_weights", False),
        qkv_bias=qkv_bias,
        proj_bias=all_bias,
        mlp_bias=all_bias,
        norm_epsilon=float(values.get("layernorm_epsilon", values.get("norm_epsilon", 1e-5))),
        rotary_base=float(values.get("rotary_base", 10000)),
        rope_scaling=_rope_scaling(values),
        max_position_embeddings=int(values.get("max_position_embeddings") or 2048),
        sliding_window=window,
        init_method_std=float(values.get("init_method_std", 0.02)),
        dtype="bf16" if values.get("bf16") else "fp16" if values.get("fp16") else "fp32",
        hf_config={},
    )


def _not_ours(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments without the one that stock and we mean differently."""
    ours = {"rotary_seq_len_interpolation_factor"} if "model_family" in values else set()
    return {name: value for name, value in values.items() if name not in ours}


def _family(values: dict[str, Any], where: Path, family: str | None, like: Family) -> Family:
    """The family that is given, or told by the arguments, or that they are most ``like``."""
    qk_norm = bool(values.get("qk_layernorm"))
    family = family or values.get("model_family")
    if family is not None and family not in FAMILIES:
        raise CheckpointError(f"{where}: family {family!r}; wanted one of {', '.join(FAMILIES)}")
    found = like if family is None else FAMILIES[family]
    if _sliding_window(values, where) and not found.has_windows:
        known = ", ".join(one.name for one in FAMILIES.values() if one.has_windows)
        raise CheckpointError(
            f"{where}: args.window_size is {values['window_size']}; this reads windows of family "
            f"{known}, not of {found}"
        )
    if qk_norm != found.has_qk_norm:
        raise CheckpointError(
            f"{where}: args.qk_layernorm is {qk_norm}; family {found} has "
            f"{'' if found.has_qk_norm else 'no '}query/key norms"
        )
    return found


def _vocab_size(values: dict[str, Any]) -> int:
    """The true vocabulary where the arguments tell it, else all stored rows.

    Stock's ``vocab_size`` is "before EOD or padding" and most tokenizers ignore it: trusting it
    could cut off trained rows.
    """
    padded: int = values.get("padded_vocab_size") or values["vocab_size"]
    if "model_family" in values:  # ours
        return values.get("vocab_size") or padded
    if values.get("tokenizer_type") == "NullTokenizer" and values.get("vocab_size"):
        return int(values["vocab_size"]) + 1  # its end-of-document id comes after the vocabulary
    return padded


def _sliding_window(values: dict[str, Any], where: Path) -> int | None:
    """Tokens that attention reaches, itself among them; Megatron counts those to the left.

    Raises:
        CheckpointError: not two integers, or a window that reaches what comes after.
    """
    window = values.get("window_size")
    if window is None:
        return None
    pair = list(window) if isinstance(window, (tuple, list)) else []
    if [type(side) for side in pair] != [int, int] or (pair[0] >= 0 and pair[1] != 0):
        raise CheckpointError(
            f"{where}: args.window_size is {window!r:.40}; wanted two integers, the tokens to the "
            "left and 0 to the right"
        )
    return None if pair[0] < 0 else pair[0] + 1  # -1: no limit


def _rope_scaling(values: dict[str, Any]) -> dict[str, Any] | None:
    if "rope_scaling" in values:  # said in full, of Megatron-Bridge
        said: dict[str, Any] | None = values["rope_scaling"]
        return said
    ours = "model_family" in values
    if values.get("use_rope_scaling"):
        factor = float(values.get("rope_scaling_factor", 8.0)) if ours else 8.0
        return {**STOCK_ROPE_SCALING, "factor": factor}
    if ours and values.get("rotary_seq_len_interpolation_factor"):  # stock never passes it on
        return {
            "rope_type": "linear",
            "factor": float(values["rotary_seq_len_interpolation_factor"]),
        }
    return None


def check_expressible(config: ModelConfig) -> None:
    """Refuse a model that Megatron has no arguments for.

    Raises:
        CheckpointError: only some of the linears have biases.
        ShapeError: layers have different numbers of FFN channels.
    """
    config.shape.check_uniform("a Megatron checkpoint", "write it --to hf")
    if config.proj_bias != config.mlp_bias or (config.proj_bias and not config.qkv_bias):
        raise CheckpointError(
            "Megatron has biases in all linears or in linear_qkv alone; this model has "
            f"qkv {config.qkv_bias}, proj {config.proj_bias}, mlp {config.mlp_bias}. "
            "Prune it with --to hf"
        )


def warn_unverified(where: Path) -> None:
    """Say once that a stock checkpoint carries nothing to check it against."""
    warnings.warn(
        f"{where}: no manifest and no config beside the weights: shape and family come from its "
        "arguments (--family overrides), its vocabulary size may be padded, and nothing can be "
        "verified",
        stacklevel=2,
    )
