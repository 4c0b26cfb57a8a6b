"""Megatron-Bridge's checkpoints: torch_dist with the model's configuration in ``run_config.yaml``.

Beside an iteration's files lies the whole run's configuration, and ``common.pt`` has no arguments.
Of it only ``model`` is read: the fields of a GPT model's provider, or those of a GPTModelConfig
with a TransformerConfig in ``transformer`` (checkpoint_utils.py, gpt_provider.py and
llama_bridge.py of NVIDIA-NeMo/Megatron-Bridge, August 2026). ``_target_`` names classes and
functions to import; here it is a word that is compared, and nothing is imported. The tokenizer lies
in ``tokenizer/``.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_prune.errors import CheckpointError
from megatron_prune.parsing import read_yaml
from megatron_prune.store.megatron_args import STOCK_ROPE_SCALING

RUN_CONFIG, TOKENIZER = "run_config.yaml", "tokenizer"
_MODELS = re.compile(
    r"(GPT|BridgeGPT|Llama(2|3|31|32|33)?|CodeLlama|Mistral|Qwen(2|25|3))"
    r"Model(Provider|Config)([0-9_]+[BM])?"
)
_OWN = """
    parallel_output scatter_embedding_sequence_parallel use_transformer_engine_full_layer_spec
    dense_grouped_gemm transformer_layer_spec hf_model_id hf_model_revision should_pad_vocab
    use_arbitrary_attention_mask share_embeddings_and_output_weights rope_scaling transformer
    seq_len_interpolation_factor generation_config
""".split()  # noqa: SIM905 - not among Megatron-LM's arguments; read here, or harmless


def read_arguments(path: Path) -> Namespace:
    """The ``model`` of a run_config.yaml under the names of Megatron-LM's arguments.

    Raises:
        CheckpointError: not such a file, another kind of model, or one that has adapters alone.
    """
    fields = _model_fields(path)
    activation = _target(fields.pop("activation_func", None))
    linear, scaled = fields.get("seq_len_interpolation_factor"), bool(fields.get("rope_scaling"))
    values = {name: value for name, value in fields.items() if name not in _OWN}
    values.update(
        swiglu=bool(fields.get("gated_linear_unit")) and activation.endswith(".silu"),
        untie_embeddings_and_output_weights=not fields.get("share_embeddings_and_output_weights"),
        group_query_attention=values.get("num_query_groups") is not None,
        padded_vocab_size=fields.get("vocab_size"),
        max_position_embeddings=fields.get("seq_length"),
        rope_scaling=_rope(path, scaled, fields.get("rope_scaling_factor"), linear),
    )
    return Namespace(**values)


def _model_fields(path: Path) -> dict[str, Any]:
    run = read_yaml(path, CheckpointError, "not the configuration of a run")
    model = run.get("model") if isinstance(run, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: has no model; wanted Megatron-Bridge's run_config.yaml")
    if run.get("peft"):
        raise CheckpointError(
            f"{path}: peft {_target(run['peft'])!r}: adapters without their model; merge them in "
            "Megatron-Bridge first"
        )
    kind = _target(model).rpartition(".")[2]
    if not _MODELS.fullmatch(kind):
        raise CheckpointError(
            f"{path}: model is a {kind or 'nameless one'}; this reads GPT, Llama, Mistral, Qwen2 "
            "and Qwen3 models without experts. Export it to Hugging Face in Megatron-Bridge"
        )
    inner = model.get("transformer")
    fields = {**(inner if isinstance(inner, dict) else {}), **model}
    spec = _target(fields.get("transformer_layer_spec"))
    if spec and not spec.startswith("megatron."):
        raise CheckpointError(f"{path}: transformer_layer_spec {spec!r}; wanted Megatron's own")
    return {name: value for name, value in fields.items() if not str(name).startswith("_")}


def _target(value: Any) -> str:
    """The word that a serialised class or function goes by; empty where there is none."""
    return str(value.get("_target_", "")) if isinstance(value, dict) else ""


def _rope(path: Path, scaled: bool, factor: Any, linear: Any) -> dict[str, Any] | None:
    """Rope scaling: unlike Megatron-LM, Megatron-Bridge passes the factors on."""
    if not scaled and linear in (None, 1):
        return None
    found = factor if scaled else linear
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise CheckpointError(f"{path}: rope factor {found!r}; wanted a number")
    if scaled:
        return {**STOCK_ROPE_SCALING, "factor": float(found)}
    return {"rope_type": "linear", "factor": float(found)}
