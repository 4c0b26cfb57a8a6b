"""What is at hand and given by mistake: formats that are not read, by the files they come with.

They are named for what they are, with what to do. Nothing of them is opened.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

ADAPTER = "adapter_config.json"
_HF = "transformers' save_pretrained"
_FOREIGN: tuple[tuple[tuple[str, ...], str, str], ...] = (
    # what a directory holds, all of it, or does not (!); what it is; what to do
    ((ADAPTER,), "a PEFT adapter without its model",
     f"load both with peft, merge_and_unload() and {_HF}"),
    (("*.gguf",), "a GGUF model of llama.cpp", "give the Hugging Face files that it was made of"),
    (("params.json", "consolidated*.pth"), "Llama's original files",
     "give the Hugging Face version, or convert with transformers' convert_llama_weights_to_hf.py"),
    (("params.json", "consolidated*.safetensors"), "Mistral's original files",
     "give the Hugging Face files of the same model (model*.safetensors with config.json)"),
    (("model_index.json",), "a diffusers pipeline", "give a language model"),
    (("model*-of-*.safetensors", "!model.safetensors.index.json"),
     "shards of weights without their model.safetensors.index.json", "copy it beside them"),
    (("pytorch_model*-of-*.bin", "!pytorch_model.bin.index.json"),
     "shards of weights without their pytorch_model.bin.index.json", "copy it beside them"),
    (("config.json", "model.*.safetensors"), "a variant of a model (transformers: variant=...)",
     "rename its weights to model.safetensors, or load and save it without a variant"),
    (("config.json", "output*.safetensors"), "a model of ExLlama, quantised",
     "give the model that it was made of"),
    (("config.json", "weights*.safetensors"), "a model of MLX", f"load it there, then {_HF}"),
    (("config.json", "weights*.npz"), "a model of MLX", f"load it there, then {_HF}"),
    (("config.json", "qmodel.pt"), "a model of HQQ, quantised",
     "give the model that it was made of"),
    (("config.json", "hf_model_*.pt"), "weights of torchtune",
     "let torchtune write them as safetensors"),
    (("config.json", "ft-model-*.safetensors"), "weights of torchtune",
     "rename them as their index does, or let torchtune write model-*.safetensors"),
    (("config.json", "rank*.safetensors"), "a checkpoint of TensorRT-LLM",
     "give the model that it was made of"),
    (("mlc-chat-config.json",), "a model of MLC", "give the model that it was made of"),
    (("model.bin", "vocabulary*"), "a model of CTranslate2", "give the model that it was made of"),
    (("ggml-*.bin",), "a GGML model of llama.cpp", "give the Hugging Face files of the same model"),
    (("adapter_model.*",), "a PEFT adapter without its adapter_config.json",
     f"load both with peft, merge_and_unload() and {_HF}"),
    (("zero_to_fp32.py",), "a DeepSpeed checkpoint",
     f"run the zero_to_fp32.py in it, then {_HF} with the model's config.json"),
    (("global_step*",), "a DeepSpeed checkpoint",
     f"join it with DeepSpeed's zero_to_fp32.py, then {_HF} with the model's config.json"),
    (("*mp_rank_*_model_states.pt",), "a DeepSpeed checkpoint",
     f"join it with DeepSpeed's zero_to_fp32.py, then {_HF} with the model's config.json"),
    (("context", "weights"), "a NeMo 2 checkpoint",
     "export it to Hugging Face with nemo.collections.llm.export_ckpt"),
    (("*.nemo",), "a directory of a NeMo archive", "export it to Hugging Face with NeMo's scripts"),
    (("model_config.yaml", "model_weights*"), "an unpacked NeMo archive",
     "export it to Hugging Face with NeMo's scripts"),
    (("model_config.yaml", "mp_rank_*"), "an unpacked NeMo archive",
     "export it to Hugging Face with NeMo's scripts"),
    (("*.onnx",), "an ONNX model", "give the model in PyTorch that it was exported from"),
    (("openvino_model.xml",), "an OpenVINO model", "give the model that it was exported from"),
    (("*.engine",), "engines of TensorRT-LLM", "give the model that they were built from"),
    (("tf_model.h5",), "TensorFlow weights", f"from_tf=True of transformers 4, then {_HF}"),
    (("saved_model.pb",), "a TensorFlow model", "give the model in PyTorch"),
    (("flax_model*.msgpack",), "Flax weights", f"from_flax=True of transformers 4, then {_HF}"),
    (("*.ckpt.index",), "a TensorFlow checkpoint", "give the model in PyTorch"),
    (("*.keras",), "a Keras model", "give the model in PyTorch"),
    (("manifest.ocdbt",), "an Orbax checkpoint (JAX)", "export it to Hugging Face"),
    (("_CHECKPOINT_METADATA",), "an Orbax checkpoint (JAX)", "export it to Hugging Face"),
    (("models--*",), "the hub's cache", "give models--ORG--NAME/snapshots/COMMIT of the model"),
    (("snapshots", "refs"), "a repository in the hub's cache", "give one of its snapshots"),
    (("checkpoint-*",), "a run of transformers' Trainer", "give one of its checkpoint-*"),
    (("model_world_size_*_rank_*.pt",), "FSDP shards of verl",
     "join them with python -m verl.model_merger merge"),
    (("pytorch_model_fsdp_0",), "FSDP shards of accelerate",
     "join them with accelerate merge-weights, with the model's config.json beside"),
    (("step-*/.metadata",), "a run of torchtitan or the like",
     "export one of its steps to Hugging Face with what wrote it"),
    (("mp_rank_*/model_rng.pt",), "a checkpoint of an older Megatron-LM, in model_rng.pt",
     "load it with the Megatron-LM that wrote it and save it with --ckpt-format torch_dist"),
    (("iter_*",), "a Megatron root without latest_checkpointed_iteration.txt",
     "give one of its iter_* directories"),
    (("*.distcp",), "a torch.distributed.checkpoint directory",
     f"load it with what wrote it and save with --ckpt-format torch_dist of Megatron, or {_HF}"),
    (("*.safetensors", "!config.json"), "weights without their config.json", "copy it beside them"),
    (("pytorch_model*.bin", "!config.json"), "weights without their config.json",
     "copy it beside them"),
    (("tokenizer*.json", "!config.json"), "a tokenizer without a model",
     "give the model's directory"),
    (("tokenizer.model", "!config.json"), "a tokenizer without a model",
     "give the model's directory"),
    (("dataset_info.json",), "a data set", "give a model"),
    (("*.parquet",), "a data set", "give a model"),
    (("*.arrow",), "a data set", "give a model"),
    (("*.ckpt",), "a checkpoint of Lightning or the like",
     f"load it with what wrote it, then {_HF}"),
    (("*.pth",), "a checkpoint of a program of its own", f"load it with what wrote it, then {_HF}"),
    (("*.pt",), "a checkpoint of a program of its own", f"load it with what wrote it, then {_HF}"),
    (("*/config.json", "!config.json"), "a directory of models or with one in it",
     "give the one that its config.json lies in"),
)  # fmt: skip

_FILES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".gguf",), "a GGUF model of llama.cpp", "give the Hugging Face files that it was made of"),
    ((".nemo",), "a NeMo archive", "export it to Hugging Face with NeMo's scripts"),
    (("config.json", ".index.json", ".bin", ".pt", ".pth", ".distcp", ".metadata"),
     "a file of a checkpoint", "give the directory that it lies in"),
    ((".safetensors",), "a file of weights or scores",
     "give the directory that it lies in, if it is a model's"),
    ((".zip", ".tar", ".gz", ".tgz", ".zst"), "an archive", "unpack it"),
)  # fmt: skip

_DOWNLOAD = (
    "; nothing is fetched from there, download it first (hf download ORG/NAME --local-dir DIR)"
)


def foreign_directory(directory: Path) -> str | None:
    """What a directory is that we do not read, and what to do; None for one that is nothing known.

    It is only asked where nothing that we read was found.
    """
    for patterns, what, do in _FOREIGN:
        if all(_holds(directory, pattern) for pattern in patterns):
            return f"{what}: not read; {do}"
    return None


def _holds(directory: Path, pattern: str) -> bool:
    there = next(directory.glob(pattern.removeprefix("!")), None) is not None
    return there != pattern.startswith("!")


def no_directory(path: Path) -> str:
    """What is at a path where a directory was wanted, and what to do."""
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist"
    if not path.exists():
        return "does not exist" + (_DOWNLOAD if _names_a_model(path) else "")
    for suffixes, what, do in _FILES:
        if path.name.endswith(suffixes):
            return f"is {what}; wanted a checkpoint directory: {do}"
    return "is a file; wanted a checkpoint directory"


def _names_a_model(path: Path) -> bool:
    """Whether what is no path reads like a name on the hub, or an address."""
    return path.parts[0].endswith(":") or (len(path.parts) == 2 and not path.parent.exists())


_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    # parts of tensor names that no plain model has
    ((".qweight", ".qzeros", ".g_idx", ".scales"), "quantised (GPTQ or AWQ)"),
    ((".SCB", ".absmax", ".quant_map", ".quant_state"), "quantised (bitsandbytes)"),
    ((".weight_scale", ".weight_scale_inv", ".weight_packed", ".weight_zero_point", ".weight_shape",
      ".input_scale", ".output_scale", ".k_scale", ".v_scale", "_blocks", "_scales"),
     "quantised (FP8, FP4 or compressed-tensors)"),
    ((".lora_A", ".lora_B", ".lora_magnitude", ".base_layer."), "wrapped by PEFT"),
    (("score.weight", "classifier.", "v_head.", "qa_outputs."), "a model with another head"),
    (("vision_tower.", "visual.", "multi_modal_projector."), "a model of more than text"),
    (("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."),
     "wrapped by torch.compile or FSDP"),
    ((".parametrizations.", ".weight_g", ".weight_v"), "reparametrised weights (torch.nn.utils)"),
    (("attention.wq.", "feed_forward.w1."), "under the names of the original Llama or Mistral"),
)  # fmt: skip


def foreign_names(names: list[str], missing: Collection[str] = ()) -> str | None:
    """What tensors are that do not fit a plain model; None where their names do not tell.

    Args:
        missing: names of the plain model that are not there.
    """
    for parts, what in _NAMES:
        for name in names:
            if any(part in name for part in parts):
                return f"{name} and others: {what}"
    if names and all(name.startswith("module.") for name in names):
        return f"{names[0]} and others: wrapped by another module (DDP, NeMo)"
    for name in names if missing else ():
        if f"model.{name}" in missing:
            return f"{name} and others: saved of the model without its head (AutoModel)"
        if any(name.endswith(f".{one}") for one in missing):
            return f"{name} and others: wrapped by another module"
    return None
