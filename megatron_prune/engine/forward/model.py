"""Megatron's GPTModel from a `ModelConfig`: the part this rank holds, without its weights yet.

On a CPU, or without Transformer Engine, the local layer spec with the modules of `layers`; with
Transformer Engine and CUDA, its spec. `weights` fills in the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_prune.engine.forward.layers import RMSNorm, SdpaAttention
from megatron_prune.engine.forward.lora import adapt_spec
from megatron_prune.engine.forward.loss import real_columns, token_losses
from megatron_prune.engine.forward.rope import inverse_frequencies, rope_kind
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.running import Runs
from megatron_prune.errors import ConfigError, ShapeError
from megatron_prune.model.family import Family
from megatron_prune.model.grid import padded_vocab_size
from megatron_prune.model.lora import Lora, check_rank
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import DTYPES, torch_dtype


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Runs):
    """How the model is run, as opposed to what it is (`ModelConfig`)."""

    seq_length: int
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    lora: Lora | None = None

    @classmethod
    def of(cls, run: Runs, seq_length: int) -> ModelOptions:
        return cls(
            seq_length=seq_length,
            dtype=run.dtype,
            transformer_impl=run.transformer_impl,
            sequence_parallel=run.sequence_parallel,
        )


def check_model(config: ModelConfig, options: ModelOptions, tensor_parallel: int) -> None:
    """Refuse what the engine cannot run faithfully, before a weight is read.

    Raises:
        ConfigError: a sequence longer than the window or the positions, an unknown rope scaling, an
            unusable option, factors of a higher rank than a weight has.
        ShapeError: sequence parallelism with a sequence that does not divide.
    """
    rope_kind(config.rope_scaling)
    seq = options.seq_length
    if seq < 2:
        raise ConfigError(f"--seq-length is {seq}; wanted 2 or more: each token predicts the next")
    if config.sliding_window is not None and seq > config.sliding_window:
        most = config.sliding_window
        remedy = f"; use --seq-length {most} or less, where both are the same" if most > 1 else ""
        raise ConfigError(
            f"--seq-length {seq} is longer than the model's sliding window of {most} tokens, which "
            f"the engine does not implement{remedy}"
        )
    if seq > config.max_position_embeddings:
        raise ConfigError(
            f"--seq-length {seq} is more than the model's max_position_embeddings "
            f"{config.max_position_embeddings}"
        )
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype {options.dtype!r}; wanted one of {', '.join(DTYPES)}")
    if options.sequence_parallel and seq % tensor_parallel:
        raise ShapeError(
            f"--sequence-parallel splits the sequence over tensor-parallel ranks: "
            f"--seq-length {seq} is not a multiple of {tensor_parallel}"
        )
    uses_transformer_engine(options.transformer_impl)
    if options.lora is not None:
        check_rank(options.lora, config.shape)


def uses_transformer_engine(choice: str) -> bool:
    """Whether the layers are Transformer Engine's: ``auto``, ``local`` or ``transformer_engine``.

    Raises:
        ConfigError: Transformer Engine is asked for and not to be had.
    """
    if choice == "local":
        return False
    from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE

    if choice == "transformer_engine" and not (HAVE_TE and torch.cuda.is_available()):
        missing = "CUDA" if HAVE_TE else "the package transformer_engine"
        raise ConfigError(f"--transformer-impl transformer_engine needs {missing}; use local")
    return bool(HAVE_TE) and torch.cuda.is_available()


class LanguageModel(GPTModel):
    """GPTModel that keeps padded vocabulary rows out of the softmax."""

    true_vocab_size: int
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """[b, s] labels, [s, b, V/TP] logits (overwritten) -> [b, s] nats, float32.

        With a ``criterion`` (see `distill`) what that makes of logits and [s, b] labels.
        """
        if self.criterion is not None:
            return self.criterion(logits, labels.t()).t().contiguous()
        losses = token_losses(
            logits, labels.t(), vocab_size=self.true_vocab_size, group=self.pg_collection.tp
        )
        return losses.t().contiguous()

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Nats of each label [b, s]; without labels the logits [b, s, V/TP], padding at -inf."""
        out: Tensor = super().forward(*args, labels=labels, **kwargs)
        if labels is None and self.post_process:
            columns = real_columns(
                self.true_vocab_size, out.shape[-1], self.pg_collection.tp.rank()
            )
            out[..., columns:] = -torch.inf
        return out


def transformer_config(
    config: ModelConfig, groups: Groups, options: ModelOptions
) -> TransformerConfig:
    """Megatron's configuration of this model in this layout."""
    shape, grid, dtype = config.shape, groups.grid, torch_dtype(options.dtype)
    fused = uses_transformer_engine(options.transformer_impl)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        normalization=config.family.norm,
        layernorm_epsilon=config.norm_epsilon,
        qk_layernorm=config.family.has_qk_norm,
        gated_linear_unit=config.family.is_gated,
        activation_func=getattr(F, config.family.activation),
        add_bias_linear=config.proj_bias or config.mlp_bias,
        add_qkv_bias=config.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=options.dtype == "bf16",
        fp16=options.dtype == "fp16",
        pipeline_dtype=dtype,
        tensor_model_parallel_size=grid.tensor_parallel,
        pipeline_model_parallel_size=grid.pipeline_parallel,
        context_parallel_size=groups.cp_group.size(),
        num_layers_in_first_pipeline_stage=grid.first_stage_layers,
        num_layers_in_last_pipeline_stage=grid.last_stage_layers,
        sequence_parallel=options.sequence_parallel and grid.tensor_parallel > 1,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        perform_initialization=False,
        use_cpu_initialization=groups.device.type == "cpu",
        gradient_accumulation_fusion=False,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        apply_rope_fusion=fused,
        masked_softmax_fusion=False,
        persist_layer_norm=fused,
        batch_p2p_comm=groups.device.type != "cpu",
        deallocate_pipeline_outputs=True,
    )


def _block_spec(family: Family, layers: int, choice: str, lora: Lora | None) -> Any:
    if uses_transformer_engine(choice):
        assert lora is None, "its linears have no factors"
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=family.has_qk_norm)
    spec = get_gpt_layer_local_spec(normalization=family.norm, qk_layernorm=family.has_qk_norm)
    parts = spec.submodules
    attention = parts.self_attention.submodules
    attention.core_attention = SdpaAttention
    if family.has_qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    parts.self_attention.params = {"attn_mask_type": AttnMaskType.causal}
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    if lora is not None:
        adapt_spec(spec, lora)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=RMSNorm)


def _build_mlps(model: GPTModel, widths: Sequence[int]) -> None:
    """Each layer's MLP anew, of its own width, as Megatron built it of the widest.

    Its `HeterogeneousTransformerConfig` does the same while the layers are built, but knows widths
    only as a JSON text that says them in multiples of 256.
    """
    for layer, width in zip(model.decoder.layers, widths, strict=True):
        own = copy(layer.config)
        own.ffn_hidden_size = width
        spec, group = layer.submodules_config.mlp, layer.mlp.tp_group
        layer.mlp = build_module(spec, config=own, ffn_hidden_size=width, tp_group=group)


def _drop_bias(module: torch.nn.Module) -> None:
    del module.bias
    module.register_parameter("bias", None)


def _drop_unwanted_biases(model: GPTModel, config: ModelConfig) -> None:
    """Megatron has one switch for biases that a configuration may switch apart."""
    for layer in model.decoder.layers:
        attention, mlp = layer.self_attention, layer.mlp
        if not config.qkv_bias and attention.linear_qkv.bias is not None:
            _drop_bias(attention.linear_qkv)
        if not config.proj_bias and attention.linear_proj.bias is not None:
            _drop_bias(attention.linear_proj)
        if not config.mlp_bias and mlp.linear_fc1.bias is not None:
            _drop_bias(mlp.linear_fc1)
            _drop_bias(mlp.linear_fc2)


def _mark_split_parameters(model: GPTModel) -> None:
    """Tell Megatron which parameters are parts: it takes all others for copies, and counts copies
    once in the gradient norm. Its layers mark their weights only when they initialise them."""
    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            split = [(module.weight, 0), (getattr(module, "bias", None), 0)]
        elif isinstance(module, RowParallelLinear):
            split = [(module.weight, 1)]
        else:
            continue
        for parameter, dim in split:
            if parameter is not None:
                parameter.tensor_model_parallel = True
                parameter.partition_dim, parameter.partition_stride = dim, 1


def build_model(config: ModelConfig, groups: Groups, options: ModelOptions) -> LanguageModel:
    """This rank's part of the model, its parameters not yet set (see `weights`).

    Raises:
        ConfigError, ShapeError: see `check_model` and `ParallelGrid.check`.
    """
    groups.grid.check(config.shape)
    check_model(config, options, groups.grid.tensor_parallel)
    megatron = transformer_config(config, groups, options)
    layers = len(groups.grid.stage_layers(config.shape.num_layers, groups.pp_rank))
    model = LanguageModel(
        megatron,
        _block_spec(config.family, layers, options.transformer_impl, options.lora),
        vocab_size=padded_vocab_size(config.shape.vocab_size, groups.grid.tensor_parallel),
        max_sequence_length=options.seq_length,
        position_embedding_type="rope",
        rotary_base=config.rotary_base,
        share_embeddings_and_output_weights=config.tied,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
    )
    model.true_vocab_size = config.shape.vocab_size
    model.rotary_pos_emb.inv_freq = inverse_frequencies(
        config.shape.kv_channels, config.rotary_base, config.rope_scaling
    ).to(groups.device)
    if config.shape.ffn_per_layer is not None:
        stage = groups.grid.stage_layers(config.shape.num_layers, groups.pp_rank)
        _build_mlps(model, [config.shape.ffn_per_layer[n] for n in stage])
    _drop_unwanted_biases(model, config)
    _mark_split_parameters(model)
    return model
