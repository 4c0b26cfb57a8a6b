"""Arguments of checkpoints as stock Megatron-LM writes and reads them (docs/stock_megatron.md)."""

from __future__ import annotations

import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_prune.errors import CheckpointError
from megatron_prune.families import FAMILIES
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.store.megatron_args import (
    beyond_stock,
    config_from_args,
    megatron_args,
    stock_flags,
)
from megatron_prune.store.stock_arguments import is_known
from tests import pico

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**more: Any) -> ModelConfig:
    shape = ModelShape(
        num_layers=2, hidden_size=48, ffn_hidden_size=96, num_attention_heads=6,
        num_query_groups=3, kv_channels=8, vocab_size=379,
    )  # fmt: skip
    return ModelConfig(
        **{"family": FAMILIES["llama"], "shape": shape, "tied": True, "hf_config": {}, **more}
    )


def stock(**more: Any) -> Namespace:
    """What core_r0.16 saves of such a model, of the attributes that matter."""
    values = vars(megatron_args(config(), ParallelGrid()))
    for ours in ("model_family", "norm_epsilon", "vocab_size"):
        del values[ours]
    return Namespace(**{**values, "tokenizer_type": "HuggingFaceTokenizer", **more})


def read(args: Namespace, family: str | None = None) -> ModelConfig:
    return config_from_args(args, Path("ck"), family)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tied": False, "norm_epsilon": 1e-6, "rotary_base": 500000.0, "dtype": "bf16"},
        {"family": FAMILIES["qwen2"], "qkv_bias": True},
        {"family": FAMILIES["qwen3"]},
        {"family": FAMILIES["mistral"], "sliding_window": 16},
        {"qkv_bias": True, "proj_bias": True, "mlp_bias": True},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {**LLAMA3, "factor": 32.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_our_arguments_read_back_as_they_were(more: dict[str, Any]) -> None:
    assert read(megatron_args(config(**more), ParallelGrid())) == config(**more)


def test_norm_epsilon_is_read_under_the_name_of_every_line() -> None:
    assert read(stock(layernorm_epsilon=1e-6)).norm_epsilon == 1e-6  # from core_r0.16
    old = stock(norm_epsilon=2e-6)
    del old.layernorm_epsilon
    assert read(old).norm_epsilon == 2e-6  # to core_r0.15


def test_stock_vocabulary_keeps_every_row_that_could_be_trained() -> None:
    assert read(stock()).shape.vocab_size == 384
    assert read(stock(vocab_size=300)).shape.vocab_size == 384
    null = stock(vocab_size=378, tokenizer_type="NullTokenizer")
    assert read(null).shape.vocab_size == 379


def test_stock_rope_scaling_is_what_stock_computes_not_what_its_flag_says() -> None:
    found = read(stock(use_rope_scaling=True, rope_scaling_factor=32.0))
    assert found.rope_scaling == LLAMA3


def test_a_window_makes_a_mistral_and_is_refused_elsewhere() -> None:
    found = read(stock(window_size=(15, 0)))
    assert (found.family, found.sliding_window) == (FAMILIES["mistral"], 16)
    assert read(stock(window_size=(-1, 0))).sliding_window is None
    with pytest.raises(CheckpointError, match=r"window_size is \(15, 0\).*mistral, not of llama"):
        read(stock(window_size=(15, 0)), "llama")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("no_rope_freq", [1, 0]), ("softmax_type", "off-by-one"), ("glu_linear_offset", 1.0),
        ("activation_func_clamp_value", 7.0), ("use_mup", True), ("attention_output_gate", True),
        ("apply_residual_connection_post_layernorm", True), ("softmax_scale", 1.0),
        ("mtp_num_layers", 1), ("heterogeneous_layers_config_path", "x.json"),
        ("rotary_seq_len_interpolation_factor", 4), ("modelopt_enabled", True),
        ("spec", ["module", "layer"]), ("rope_type", "yarn"), ("num_experts", 8),
    ],
)  # fmt: skip
def test_kinds_of_model_that_would_be_read_wrongly_are_refused(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=f"args.{name} is"):
        read(stock(**{name: value}))


def test_every_field_of_the_installed_megatron_is_in_a_list() -> None:
    known = [field.name for field in fields(TransformerConfig) if is_known(field.name)]
    assert known == [field.name for field in fields(TransformerConfig)]
    assert not is_known("embedding_multiplier")


def test_arguments_that_nobody_knows_are_named_where_they_are_set() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(stock(new_switch=False, new_number=0, wandb_project="x", moe_router_topk=2))
    with pytest.warns(UserWarning, match=r"embedding_multiplier=2.0"):
        read(stock(embedding_multiplier=2.0))


def test_windows_in_some_layers_have_their_flag() -> None:
    values = {"use_sliding_window": True, "max_window_layers": 1}
    some = config(family=FAMILIES["qwen2"], sliding_window=16, hf_config=values)
    assert stock_flags(some) == ["--window-size 15,0", "--window-attn-skip-freq '[0,1]'"]
    assert megatron_args(some, ParallelGrid()).window_attn_skip_freq == [0, 1]


def test_flags_name_what_stock_does_not_take_from_a_checkpoint() -> None:
    assert stock_flags(config()) == []
    odd = config(norm_epsilon=1e-6, rope_scaling=LLAMA3, sliding_window=16, dtype="bf16")
    assert stock_flags(odd) == [
        "--norm-epsilon 1e-06", "--use-rope-scaling", "--window-size 15,0", "--bf16",
    ]  # fmt: skip
    assert beyond_stock(odd) == []
    beyond = replace(odd, rope_scaling={**LLAMA3, "factor": 32.0}, rotary_base=10000.5)
    assert len(beyond_stock(beyond)) == 2 and "--use-rope-scaling" not in stock_flags(beyond)


def test_legacy_vocabulary_padded_by_another_divisor_is_read(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    root = tmp_path / "ck"
    pico.ok(
        "convert", "--load", models("gqa"), "--save", root, "--to", "megatron",
        "--ckpt-format", "torch", "--tensor-model-parallel-size", 3,
    )  # fmt: skip
    files = sorted(root.glob("iter_*/mp_rank_*/*.pt"))
    states = [torch.load(file, weights_only=False) for file in files]
    rows = 127  # 3 x 127 = 381; Megatron's default divisor makes it 3 x 128
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.cat([state["model"][name] for state in states])
        for rank, state in enumerate(states):
            state["model"][name] = whole[rank * rows : (rank + 1) * rows].clone()
    for file, state in zip(files, states, strict=True):
        torch.save(state, file)
    for iteration in root.glob("iter_*"):
        shutil.rmtree(iteration / "hf")
        (iteration / "manifest.json").unlink()
    pico.ok("convert", "--load", root, "--save", tmp_path / "back", "--to", "hf")
    pico.assert_same(pico.tensors(tmp_path / "back"), pico.tensors(models("gqa")))
