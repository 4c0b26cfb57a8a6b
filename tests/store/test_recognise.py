"""What is given by mistake is named for what it is, with what to do, and never called damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.store import open_source
from tests.pico import edit_config

Models, Shards = Callable[[str], Path], Callable[..., Path]


def refusal(path: Path) -> str:
    """The message it is refused with: bad input, not damage."""
    with pytest.raises(CheckpointError) as error:
        open_source(path)
    assert not isinstance(error.value, DamagedError), error.value
    assert "copy it again" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ("adapter_config.json adapter_model.safetensors", "PEFT adapter"),
        ("model-q4.gguf README.md", "GGUF"),
        ("params.json consolidated.00.pth tokenizer.model", "Llama's original"),
        ("params.json consolidated.safetensors tokenizer.model", "Mistral's original"),
        ("model_index.json unet/x", "diffusers"),
        ("zero_to_fp32.py latest global_step5/mp_rank_00_model_states.pt", "DeepSpeed"),
        ("latest global_step5/mp_rank_00_model_states.pt", "DeepSpeed"),
        ("mp_rank_00_model_states.pt zero_pp_rank_0_mp_rank_00_optim_states.pt", "DeepSpeed"),
        ("context/model.yaml weights/common.pt", "NeMo 2"),
        ("model.nemo", "NeMo"),
        ("model_config.yaml model_weights/metadata.json", "NeMo"),
        ("model_config.yaml mp_rank_00/model_weights.ckpt", "NeMo"),
        ("config.json model.onnx", "ONNX"),
        ("config.json tf_model.h5", "TensorFlow"),
        ("config.json flax_model.msgpack", "Flax"),
        ("config.json rank0.engine", "TensorRT-LLM"),
        ("config.json .metadata __0_0.distcp", "transformers' distributed checkpoint"),
        (".metadata __0_0.distcp", "torch.distributed.checkpoint"),
        ("__0_0.distcp", "torch.distributed.checkpoint"),
        ("snapshots/a/config.json refs/main blobs/x", "hub's cache"),
        ("checkpoint-500/config.json", "checkpoint-*"),
        ("iter_0000001/common.pt", "latest_checkpointed_iteration.txt"),
        ("config.json model-00001-of-00002.safetensors", "without their model.safetensors.index"),
        ("config.json pytorch_model-00001-of-00002.bin", "without their pytorch_model.bin.index"),
        ("config.json model.fp16.safetensors", "variant"),
        ("config.json output.safetensors", "ExLlama"),
        ("config.json weights.npz", "MLX"),
        ("config.json qmodel.pt", "HQQ"),
        ("config.json hf_model_0001_0.pt", "torchtune"),
        ("config.json rank0.safetensors", "TensorRT-LLM"),
        ("config.json model.bin vocabulary.json", "CTranslate2"),
        ("ggml-model-q4_0.bin", "GGML"),
        ("adapter_model.bin README.md", "without its adapter_config.json"),
        ("checkpoint model.ckpt.index model.ckpt.data-00000-of-00001", "TensorFlow"),
        ("manifest.ocdbt d/x", "Orbax"),
        ("models--a--b/refs/main version.txt", "hub's cache"),
        ("model_world_size_8_rank_0.pt huggingface/config.json", "verl"),
        ("pytorch_model_fsdp_0/.metadata optimizer_0/.metadata", "accelerate"),
        ("step-500/.metadata", "torchtitan"),
        ("mp_rank_00/model_rng.pt", "older Megatron-LM"),
        ("dataset_info.json data-00000-of-00001.arrow", "data set"),
        ("epoch=1.ckpt", "Lightning"),
        ("ckpt.pt", "program of its own"),
        ("a/config.json b/config.json", "directory of models"),
        ("tokenizer.json tokenizer_config.json", "tokenizer without a model"),
        ("model.safetensors", "without their config.json"),
        ("config.json tokenizer.json", "no weights"),
        ("notes.txt", "no config.json"),
    ],
)
def test_a_directory_that_is_something_else(files: str, says: str, tmp_path: Path) -> None:
    for name in files.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "says"),
    [("m.gguf", "GGUF"), ("m.nemo", "NeMo"), ("model.safetensors", "directory that it lies in"),
     ("m.tar.gz", "unpack"), ("x", "wanted a checkpoint directory")],
)  # fmt: skip
def test_a_file_in_place_of_a_directory(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    assert says in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"GGUF\x03\0\0\0", "GGUF"),
        (b"\x80\x02}q\0.", "before 1.6"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_something_else(
    content: bytes, says: str, name: str, models: Models, tmp_path: Path
) -> None:
    shutil.copy(models("gqa") / "config.json", tmp_path)
    (tmp_path / name).write_bytes(content)
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("suffixes", "says"),
    [
        (("qweight", "qzeros", "scales"), "GPTQ"), (("weight_packed", "weight_scale"), "FP8"),
        (("weight.absmax",), "bitsandbytes"), (("base_layer.weight", "lora_A.weight"), "PEFT"),
    ],
)  # fmt: skip
def test_quantised_names_without_a_word_in_the_config(
    suffixes: tuple[str, ...], says: str, models: Models, tmp_path: Path
) -> None:
    found = load_file(models("gqa") / "model.safetensors")
    stored = {n: x for n, x in found.items() if "_proj" not in n} | {
        name.replace("weight", suffix): torch.zeros(2, dtype=torch.int32)
        for name in found
        if "_proj" in name
        for suffix in suffixes
    }
    shutil.copy(models("gqa") / "config.json", tmp_path)
    save_file(stored, tmp_path / "model.safetensors")
    assert says in refusal(tmp_path)
    edit_config(tmp_path / "config.json", quantization_config={"quant_method": "awq"})
    assert "quantization_config 'awq'" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda name: name.removeprefix("model."), "without its head"),
        (lambda name: f"base_model.model.{name}", "wrapped by another module"),
        (lambda name: f"language_model.{name}", "wrapped by another module"),
        (lambda name: name.replace("_proj.", "_proj.parametrizations."), "reparametrised"),
    ],
)
def test_weights_under_the_names_of_another_module(
    rename: Callable[[str], str], says: str, models: Models, tmp_path: Path
) -> None:
    found = load_file(models("gqa") / "model.safetensors")
    shutil.copy(models("gqa") / "config.json", tmp_path)
    save_file({rename(name): x for name, x in found.items()}, tmp_path / "model.safetensors")
    assert says in refusal(tmp_path)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("meta-llama/Llama-2-7b-hf", "hf download"),
        ("https://huggingface.co/a/b", "hf download"),
        ("nowhere", "does not exist"),
    ],
)
def test_what_is_not_there(path: str, says: str) -> None:
    assert says in refusal(Path(path))


def test_a_link_to_nothing_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("gone")
    assert "is a link to gone, which does not exist" in refusal(tmp_path / "x")


def test_an_adapter_beside_the_model(models: Models, tmp_path: Path) -> None:
    path = Path(shutil.copytree(models("gqa"), tmp_path / "m"))
    (path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in refusal(path)


def test_of_two_sets_of_weights_the_one_of_transformers_is_read(
    models: Models, tmp_path: Path
) -> None:
    """And the other is named: an index beside one file, torch's files beside safetensors."""
    from transformers import AutoModelForCausalLM

    path = Path(shutil.copytree(models("gqa"), tmp_path / "m"))
    other = {name: x + 1 for name, x in load_file(path / "model.safetensors").items()}
    save_file(other, path / "a.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(other, "a.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(other, path / "pytorch_model.bin")
    (path / "original").mkdir()
    with pytest.warns(UserWarning, match=r"read from model.safetensors; left out") as found:
        source = open_source(path)
    for name in ("a.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "original/"):
        assert name in str(found[0].message)
    theirs = AutoModelForCausalLM.from_pretrained(path).model.norm.weight
    assert torch.equal(source.read("decoder.final_layernorm.weight"), theirs)


def test_megatrons_torch_dcp_is_a_format_and_no_damage(shards: Shards, tmp_path: Path) -> None:
    path = Path(shutil.copytree(shards("gqa", "torch_dist", 3, 1), tmp_path / "c"))
    step = path / "iter_0000001"
    (step / "metadata.json").unlink()
    with pytest.raises(DamagedError, match="which its manifest.json lists"):
        open_source(path)
    (step / "manifest.json").unlink()
    assert "torch_dcp" in refusal(path)


def test_a_metadata_of_another_program_is_no_damage(shards: Shards, tmp_path: Path) -> None:
    path = Path(shutil.copytree(shards("gqa", "torch_dist", 3, 1), tmp_path / "c"))
    (path / "iter_0000001/metadata.json").write_text('{"name": "a web extension"}')
    assert "no sharded_backend" in refusal(path)


def test_an_interleaved_legacy_file_is_no_damage(shards: Shards, tmp_path: Path) -> None:
    path = Path(shutil.copytree(shards("gqa", "torch", 3, 1), tmp_path / "c"))
    file = path / "iter_0000001/mp_rank_00/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    state["model0"] = state.pop("model")
    torch.save(state, file)
    assert "interleaved pipeline" in refusal(path)


def test_names_of_another_framework_in_a_torch_dist_are_no_damage(
    shards: Shards, tmp_path: Path
) -> None:
    import pickle

    path = Path(shutil.copytree(shards("gqa", "torch_dist", 3, 1), tmp_path / "c"))
    file = path / "iter_0000001/.metadata"
    index = pickle.loads(file.read_bytes())
    index.state_dict_metadata = {f"module.{k}": x for k, x in index.state_dict_metadata.items()}
    index.storage_data = {
        type(place)(f"module.{place.fqn}", place.offset): x
        for place, x in index.storage_data.items()
    }
    file.write_bytes(pickle.dumps(index))
    (file.parent / "manifest.json").unlink()
    assert "module.decoder" in refusal(path)


def test_files_of_others_under_our_names_are_named_and_left(models: Models, tmp_path: Path) -> None:
    path = Path(shutil.copytree(models("gqa"), tmp_path / "m"))
    for name in ("manifest.json", "plan.json", "repair.json"):
        (path / name).write_text('{"name": "a web extension", "version": 1, "files": {}}')
    with pytest.warns(UserWarning, match=r"left out.*manifest.json, plan.json, repair.json"):
        source = open_source(path)
    assert source.plan_path is None and not {"manifest.json", "plan.json"} & {
        *source.companion_files
    }
