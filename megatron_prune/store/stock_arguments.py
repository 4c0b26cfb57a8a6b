"""Arguments of stock Megatron: which of them change the function that a dense GPT model computes.

Three lists, over the arguments and TransformerConfig fields of Megatron-LM core_v0.8.0 to 0.16.1
and of main (d98e8a64, August 2026), found by reading arguments.py, the configuration classes and
every assignment to ``args`` there: those that change it, with the values that do not; those that
`megatron_args` reads; and those that do not change it, however they are set, once the first are as
wanted (``moe_router_topk`` without experts). What is in none of them is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import CheckpointError

_CHANGES: dict[str, tuple[tuple[Any, ...], str]] = {
    "swiglu": ((True,), "only SwiGLU models"),
    "squared_relu": ((False,), "only SwiGLU models"),
    "openai_gelu": ((False,), "only SwiGLU models"),
    "quick_geglu": ((False,), "only SwiGLU models"),
    "glu_linear_offset": ((0, None), "only the plain SwiGLU"),
    "activation_func_clamp_value": ((None,), "only the plain SwiGLU"),
    "normalization": (("RMSNorm",), "only RMSNorm models"),
    "apply_layernorm_1p": ((False,), "no 1+weight norms"),
    "layernorm_zero_centered_gamma": ((False,), "no 1+weight norms"),
    "apply_residual_connection_post_layernorm": ((False,), "only the residual before the norm"),
    "position_embedding_type": (("rope",), "only rotary position embeddings"),
    "rope_type": ((None, "rope"), "only the plain rotary embeddings"),
    "rotary_percent": ((1,), "only full rotary embeddings"),
    "rotary_interleaved": ((False,), "only half-split rotary embeddings"),
    "rotary_seq_len_interpolation_factor": (
        (None, 1),
        "no interpolated positions, which core_v0.16 of Megatron-LM leaves out and main computes",
    ),
    "mrope_section": ((None,), "only rotary embeddings of one position"),
    "no_rope_freq": ((None,), "the same attention in all layers"),
    "window_attn_skip_freq": ((None,), "the same attention in all layers"),
    "softmax_type": (("vanilla",), "the plain softmax"),
    "softmax_scale": ((None,), "the softmax scaled by the channels of a head"),
    "qk_l2_norm": ((False,), "no query/key norms without weights"),
    "attention_output_gate": ((False,), "no gates behind attention"),
    "multi_latent_attention": ((False,), "no latent attention"),
    "experimental_attention_variant": ((None,), "only softmax attention"),
    "linear_attention_freq": ((None,), "only softmax attention"),
    "num_experts": ((None, 0), "no mixture of experts"),
    "num_moe_experts": ((None, 0), "no mixture of experts"),
    "mtp_num_layers": ((None, 0), "no layers that predict further tokens"),
    "mtp_hybrid_override_pattern": ((None,), "no layers that predict further tokens"),
    "is_hybrid_model": ((False,), "only transformer layers"),
    "hybrid_layer_pattern": ((None,), "only transformer layers"),
    "hybrid_override_pattern": ((None,), "only transformer layers"),
    "hybrid_attention_ratio": ((0, None), "only transformer layers"),
    "hybrid_mlp_ratio": ((0, None), "only transformer layers"),
    "heterogeneous_block_specs": ((False,), "the same layer throughout"),
    "heterogeneous_layers_config_path": ((None,), "the same layer throughout"),
    "heterogeneous_layers_config_encoded_json": ((None, ""), "the same layer throughout"),
    "enable_mhc_connections": ((False,), "one residual stream"),
    "use_mup": ((False,), "no scaled embeddings and logits (muP)"),
    "spec": ((None,), "Megatron's own layers"),
    "decoder_num_layers": ((None,), "models of one stack of layers"),
    "retro_add_retriever": ((False,), "no retriever"),
    "use_legacy_models": ((False,), "models of megatron.core"),
    "modelopt_enabled": ((False,), "no quantised model"),
    "restore_modelopt_state": ((False,), "no quantised model"),
    "yaml_cfg": ((None,), "arguments, not a YAML file"),
    "virtual_pipeline_model_parallel_size": ((None,), "no interleaved pipeline"),
}  # fmt: skip

_READ = """
    num_layers hidden_size num_attention_heads ffn_hidden_size padded_vocab_size vocab_size
    group_query_attention num_query_groups add_bias_linear add_qkv_bias window_size
    qk_layernorm kv_channels untie_embeddings_and_output_weights layernorm_epsilon
    norm_epsilon rotary_base max_position_embeddings init_method_std bf16 fp16 model_family
    use_rope_scaling rope_scaling_factor rope_scaling
""".split()  # noqa: SIM905

_HARMLESS_PREFIXES = tuple(
    """
    adam_ adlr_ app_tag_ async_ bert_ biencoder_ check_ checkpoint_ ckpt_ consumed_
    cpu_offloading cuda_graph_ data_ dataloader_ ddp_ decoupled_ dino_ dist_ckpt_ distrib
    distributed_ do_ dsa_ error_injection_ eval_ exit_ exp_avg expert_ fim_ flight_recorder_
    fp4 fp8 fsdp_ ft_ gdp_ grad_ grpo_ gtp_ ict_ inference_ indexer_ inprocess_ kitchen_
    langrl_ linear_ lion_ load log_ logits_ lr mamba_ manual_gc mask_ megatron_fsdp_ memory_
    mhc_ mla_ moe_ mtp_ muon_ mup_ no_load no_save non_persistent_ null_tokenizer_ one_logger_
    optimizer otel_ overlap_ per_split pipeline_ profile pytorch_profiler_ recompute_
    relative_attention_ rerun_ retriever_ retro_ rl_ save sft straggler_ tensorboard_
    tiktoken_ timing_ tokenizer_ torch_fsdp2 tp_comm_ train_ use_inference use_kitchen
    use_precision valid wandb_ warmup wd_ weight_decay wgrad_ yarn_
    """.split()  # noqa: SIM905
)

_HARMLESS = """
    account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split
    accumulate_allreduce_grads_in_fp32 activation_func activation_func_fp8_input_store
    activation_offload_fraction add_position_embedding align_grad_reduce align_param_gather
    allow_ambiguous_pad_tokens apply_query_key_layer_scaling apply_rope_fusion
    apply_wd_to_qk_layernorm attention_backend attention_dropout attention_softmax_in_fp32
    auto_detect_ckpt_format autocast_dtype barrier_with_L1_time batch_invariant_backend
    batch_invariant_mode batch_p2p_comm batch_p2p_sync batch_size bias_activation_fusion
    bias_dropout_fusion bias_gelu_fusion bias_swiglu_fusion block_data_path cache_mla_latents
    calc_ft_timeouts calculate_per_token_loss chat_template classes_fraction clip_grad
    clone_scatter_output_in_embedding config_logger_dir context_parallel_size cp_comm_type
    create_all_gather_group create_attention_mask_in_dataloader cross_entropy_fusion_impl
    cross_entropy_loss_fusion curr_iteration deallocate_pipeline_outputs
    decode_only_cuda_graphs decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers
    decoder_seq_length decrease_batch_size_if_needed defer_embedding_wgrad_compute
    delay_grad_reduce delay_offload_until_cuda_graph delay_param_gather delay_wgrad_compute
    delta_offload_bytes_across_pp_ranks deprecated_use_mcore_models deterministic_mode
    disable_bf16_reduced_precision_matmul disable_chunked_prefill disable_jit_fuser
    disable_mamba_mem_eff_path disable_msc_deprecated disable_parameter_transpose_cache
    disable_straggler_on_startup disable_symmetric_registration dump_param_to_param_group_map
    embedding_init_method embedding_init_method_std embedding_path empty_unused_memory_level
    enable_autocast enable_chunked_prefill enable_cuda_graph enable_experimental
    enable_ft_package enable_full_sharding_in_hsdp enable_gloo_process_groups enable_msc
    enable_one_logger encoder_num_layers encoder_pipeline_model_parallel_size
    encoder_seq_length encoder_tensor_model_parallel_size end_weight_decay eod_mask_loss
    ep_overlap_early_attn_memory_release evidence_data_path
    experimental_attention_variant_loss_scale_func external_cuda_graph fake_process_group
    filter_warnings finalize_model_grads_func fine_grained_activation_offloading
    fine_grained_offloading_max_inflight_offloads finetune first_last_layers_bf16
    first_pipeline_num_layers flash_attention_version flash_decode fp16_lm_cross_entropy
    fp32_residual_connection freeze_all_layers full_validation fully_parallel_load
    fully_parallel_save fused_residual_rmsnorm fused_single_qkv_rope gated_linear_unit
    global_batch_size gpu_sniff_test_interval gradient_accumulation_fusion
    gradient_reduce_div_fusion head_lr_mult hetereogenous_dist_checkpoint hidden_dropout
    hierarchical_context_parallel_sizes high_priority_a2a_comm_stream
    high_priority_stream_groups hybrid_context_parallel hysteresis img_h img_w init_method
    init_method_xavier_uniform init_model_with_meta_device initial_loss_scale iter_per_epoch
    iteration iterations_to_skip keep_fp8_transpose_cache
    keep_fp8_transpose_cache_when_using_custom_fsdp kv_lora_rank last_pipeline_num_layers
    lazy_mpu_init legacy_tokenizer local_rank logging_level logit_dtype loss_scale
    loss_scale_window main_grads_dtype main_params_dtype make_vocab_size_divisible_by
    masked_softmax_fusion max_seqlen_per_dp_cp_rank max_tokens_to_oom merge_file metadata_path
    micro_batch_size microbatch_group_size_per_vp_stage mid_level_dataset_surplus
    min_loss_scale min_lr min_offloaded_tensor_size mlp_chunks_for_prefill
    mlp_chunks_for_training mmap_bin_files mock_data model_parallel_size model_type
    modules_to_filter most_recent_k mscale mscale_all_dim multiple_validation_sets
    nccl_all_reduce_for_prefill nccl_communicator_config_path nccl_ub no_persist_layer_norm
    no_sync_func no_weight_decay_cond_type num_channels num_classes
    num_dataset_builder_threads num_distributed_optimizer_instances
    num_floating_point_operations_so_far num_layers_at_end_in_bf16 num_layers_at_start_in_bf16
    num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage
    num_layers_per_virtual_pipeline_stage num_microbatches_with_partial_activation_checkpoints
    num_speculative_tokens num_virtual_stages_per_pipeline_rank num_workers nvtx_ranges
    object_storage_cache_path offload_modules offset_sampling_seed_by_dp_rank onnx_safe
    outer_dp_sharding_strategy output_bert_embeddings output_layer_init_method
    override_ckpt_iteration override_opt_param_scheduler pad_vocab_size param_sync_func
    params_dtype patch_dim per_dataset_sequences_path perform_initialization perform_rl_step
    persist_layer_norm phase_transition_iterations pin_cpu_grads pin_cpu_params
    pretrained_checkpoint q_lora_rank qk_clip qk_clip_alpha qk_clip_threshold qk_head_dim
    qk_pos_emb_head_dim quant_recipe query_in_block_prob rampup_batch_size rank
    record_memory_history record_shapes refit_method renormalize_blend_weights replication
    replication_factor replication_jump reset_attention_mask reset_position_ids
    result_rejected_tracker_filename reuse_grad_buf_for_mxfp8_param_ag rotary_scaling_factor
    run_workload_inspector_server runtime_time_unit s3_cache_path sample_rate
    scatter_gather_tensors_in_pipeline seed seq_length sequence_parallel
    set_level_for_all_loggers sgd_momentum sharp_enabled_group short_seq_prob skip_train
    skipped_train_samples special_tokens split standalone_embedding_stage start_eval_at_iter
    start_weight_decay step_batch_size_schedule strict_fsdp_dtensor_load
    suggested_communication_unit_size swin_backbone_type symmetric_ar_type
    te_precision_config_file te_rng_tracker tensor_model_parallel_size
    tensor_parallel_num_weight_shards test_data_path test_mode throughput_window_size timers
    titles_data_path to_test tp_only_amax_red transformer_impl
    transformer_pipeline_model_parallel_size trust_remote_code use_checkpoint_args
    use_checkpoint_opt_param_scheduler use_cpu_initialization use_custom_fsdp use_dist_ckpt
    use_dist_ckpt_deprecated use_distributed_optimizer use_flash_attn
    use_fused_weighted_squared_relu use_gigatoken use_gloo_process_groups
    use_grouped_gemm_for_dense_mlp use_grouped_gemm_for_shared_expert
    use_layer_wise_distributed_optimizer use_layer_wise_param_layout use_legacy_static_engine
    use_mamba_mem_eff_path use_megatron_fsdp use_mp_args_from_checkpoint_args
    use_nsys_profiler use_one_sent_docs use_persistent_ckpt_worker use_pytorch_profiler
    use_ring_exchange_p2p use_rotary_position_embeddings use_sharp use_te_activation_func
    use_te_rng_tracker use_tokenizer_model_from_checkpoint_args use_torch_fsdp2
    use_torch_optimizer_for_cpu_offload use_tp_pp_dp_mapping use_transformer_engine_op_fuser
    v_head_dim variable_seq_lengths verify_integrity vision_backbone_type vision_pretraining
    vision_pretraining_type vocab_extra_ids vocab_file world_size wsd_decay_steps
""".split()  # noqa: SIM905

_KNOWN = {*_CHANGES, *_READ, *_HARMLESS}


def check_function(values: Mapping[str, Any], where: str) -> list[str]:
    """Refuse arguments that make another function of the model than the one that we read.

    Args:
        values: an ``args`` namespace, or the fields of a TransformerConfig.
        where: what the names are fields of, for the message.

    Returns:
        What is unknown and set, as ``name=value``.

    Raises:
        CheckpointError: with the first one's name and value.
    """
    for name, (harmless, reads) in _CHANGES.items():
        if name in values and values[name] not in harmless:
            raise CheckpointError(f"{where}{name} is {values[name]!r}; this reads {reads}")
    return [
        f"{name}={value!r:.40}"
        for name, value in sorted(values.items())
        if value and not is_known(name)
    ]


def is_known(name: str) -> bool:
    """Whether the argument is in one of the lists; those that begin with an underscore are."""
    return name in _KNOWN or name.startswith(("_", *_HARMLESS_PREFIXES))
