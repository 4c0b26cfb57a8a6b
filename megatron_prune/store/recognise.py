"""What is at hand and given by mistake: formats that are not read, by the files they come with.

They are named for what they are, with what to do. Nothing of them is opened but the first bytes of
a file that is not what its name says.
"""

from __future__ import annotations

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
    (("snapshots", "refs"), "a repository in the hub's cache", "give one of its snapshots"),
    (("checkpoint-*",), "a run of transformers' Trainer", "give one of its checkpoint-*"),
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
)  # fmt: skip

_FILES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    ((".gguf",), "a GGUF model of llama.cpp", "give the Hugging Face files that it was made of"),
    ((".nemo",), "a NeMo archive", "export it to Hugging Face with NeMo's scripts"),
    ((".safetensors", ".bin", ".pt", ".pth", ".distcp", ".json", ".txt", ".yaml"),
     "a file of a checkpoint", "give the directory that it lies in"),
    ((".zip", ".tar", ".gz", ".tgz", ".zst"), "an archive", "unpack it"),
)  # fmt: skip

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file; run 'git lfs pull' there"),
    (b"GGUF", "a GGUF model of llama.cpp; give the Hugging Face directory that it was made of"),
    (b"<!", "a web page, not the file; download it again, with a token if the model wants one"),
    (b"<html", "a web page, not the file; download it again, with a token if the model wants one"),
    (b"\x80\x02", "in torch's format before 1.6; torch.load it and torch.save it again"),
    (b"\x93NUMPY", "a numpy array, no model"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it"),
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


def foreign_file(path: Path) -> str:
    """What a file is that was given for a directory, and what to do."""
    for suffixes, what, do in _FILES:
        if path.name.endswith(suffixes):
            return f"is {what}; wanted a checkpoint directory: {do}"
    return "is a file; wanted a checkpoint directory"


def foreign_content(path: Path) -> str | None:
    """What a file of weights really is, and what to do; None where its first bytes do not tell."""
    with open(path, "rb") as file:
        start = file.read(32)
    return next((f"is {what}" for begins, what in _BEGINNINGS if start.startswith(begins)), None)


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
    (("attention.wq.", "feed_forward.w1."), "under the names of the original Llama or Mistral"),
)  # fmt: skip


def foreign_names(names: list[str]) -> str | None:
    """What tensors are that do not fit a plain model; None where their names do not tell."""
    for parts, what in _NAMES:
        for name in names:
            if any(part in name for part in parts):
                return f"{name} and others: {what}"
    if names and all(name.startswith("module.") for name in names):
        return f"{names[0]} and others: wrapped by another module (DDP, NeMo)"
    return None
