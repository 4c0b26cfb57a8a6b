"""Law 1: Hugging Face -> Megatron at any TP, PP and format -> Hugging Face is bitwise the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests import pico
from tests.pico import assert_same, ok, tensors

Models, Shards = Callable[[str], Path], Callable[..., Path]
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"

LAYOUTS = [
    *[
        (kind, tp, pp)
        for kind in ("gqa", "tied", "qwen", "all_bias")
        for tp, pp in ((3, 1), (3, 2))
    ],
    *[("mha", tp, pp) for tp, pp in ((1, 1), (2, 2), (3, 1), (6, 1))],
    *[(kind, tp, pp) for kind in ("four", "qwen_tied") for tp, pp in ((2, 2), (4, 1))],
    *[("mqa", 1, 1), ("mqa", 1, 2), ("mistral", 3, 1), ("llama3", 3, 4), ("tied", 1, 4)],
    *[("qwen3", 3, 2), ("qwen3_tied", 2, 1)],
    *[("bf16", 3, 2), ("bf16", 1, 1), ("fp16", 3, 2), ("fp16", 1, 2)],
]


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize(("kind", "tp", "pp"), LAYOUTS)
def test_round_trip_is_bitwise(
    kind: str, tp: int, pp: int, ckpt_format: str, models: Models, shards: Shards, tmp_path: Path
) -> None:
    ok(
        "convert",
        "--load",
        shards(kind, ckpt_format, tp, pp),
        "--save",
        tmp_path / "b",
        "--to",
        "hf",
    )
    assert_same(tensors(tmp_path / "b"), tensors(models(kind)))


@pytest.mark.parametrize("kind", ["qwen", "tied"])
def test_round_trip_through_the_local_specs_names_is_bitwise(
    kind: str, models: Models, tmp_path: Path
) -> None:
    """The legacy format names the norms for one layer spec; both are read."""
    to = ("--to", "megatron", "--ckpt-format", "torch", TP, 3, "--transformer-impl", "local")
    ok("convert", "--load", models(kind), "--save", tmp_path / "m", *to)
    file = tmp_path / "m/iter_0000001/mp_rank_02/model_optim_rng.pt"
    keys = torch.load(file, weights_only=False)["model"]
    assert "decoder.layers.0.input_layernorm.weight" in keys
    assert not any("layer_norm_weight" in key for key in keys)
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), tensors(models(kind)))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize(
    ("stages", "layers"),
    [
        ((PP, 2, FIRST, 1), [1, 3]),
        ((PP, 2, LAST, 1), [3, 1]),
        ((PP, 3, FIRST, 1, LAST, 2), [1, 1, 2]),
    ],
)
def test_uneven_stages_round_trip(
    stages: tuple, layers: list[int], ckpt_format: str, models: Models, tmp_path: Path
) -> None:
    to = ("--to", "megatron", "--ckpt-format", ckpt_format, TP, 3, *stages)
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "m", *to)
    if ckpt_format == "torch":
        files = sorted((tmp_path / "m").rglob("mp_rank_00_*/model_optim_rng.pt"))
        keys = [torch.load(file, weights_only=False)["model"] for file in files]
        assert [sum("fc2.weight" in key for key in stage) for stage in keys] == layers
    ok("reshard", "--load", tmp_path / "m", "--save", tmp_path / "r", PP, 4)
    ok("convert", "--load", tmp_path / "r", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), tensors(models("gqa")))


def test_resharding_in_a_chain_of_formats_and_layouts_loses_nothing(
    models: Models, shards: Shards, tmp_path: Path
) -> None:
    last = shards("qwen_tied", "torch", 2, 2)
    chain = [("torch_dist", 4, 1), ("torch", 1, 4), ("torch_dist", 2, 2), ("torch", 4, 2)]
    for number, (ckpt_format, tp, pp) in enumerate(chain):
        to = ("--ckpt-format", ckpt_format, TP, tp, PP, pp)
        ok("reshard", "--load", last, "--save", tmp_path / str(number), *to)
        last = tmp_path / str(number)
    ok("convert", "--load", last, "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), tensors(models("qwen_tied")))


def test_a_source_in_several_safetensors_files_comes_back_the_same(
    models: Models, tmp_path: Path
) -> None:
    to = ("--to", "hf", "--max-shard-size", "40KB")
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "s", *to)
    files = sorted(path.name for path in (tmp_path / "s").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "s/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in tensors(tmp_path / "s").values()
    )
    assert_same(tensors(tmp_path / "s"), tensors(models("gqa")))
    ok("convert", "--load", tmp_path / "s", "--save", tmp_path / "m", "--to", "megatron", TP, 3)
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), tensors(models("gqa")))


def test_no_safetensors_file_is_larger_than_asked_unless_one_tensor_is(
    models: Models, tmp_path: Path
) -> None:
    to = ("--to", "hf", "--max-shard-size", "80KB")
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "s", *to)
    for path in (tmp_path / "s").glob("*.safetensors"):
        assert path.stat().st_size < 80_000 + 10_000  # and the header


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_bin_sources_are_read(sharded: bool, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("tied"), tmp_path / "s")
    (tmp_path / "s/model.safetensors").unlink()
    found = tensors(models("tied"))
    if sharded:
        halves = {"a.bin": sorted(found)[::2], "b.bin": sorted(found)[1::2]}
        for file, names in halves.items():
            torch.save({name: found[name] for name in names}, tmp_path / "s" / file)
        weight_map = {name: file for file, names in halves.items() for name in names}
        index = tmp_path / "s/pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}  # older exports
        torch.save(found | extra, tmp_path / "s/pytorch_model.bin")
    ok("convert", "--load", tmp_path / "s", "--save", tmp_path / "m", "--to", "megatron", TP, 3)
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), found)
    assert not list((tmp_path / "b").glob("*.bin"))


@pytest.mark.parametrize("kind", ["gqa", "qwen", "mistral", "llama3", "tied", "attention_bias"])
def test_transformers_loads_the_export_and_computes_the_same(
    kind: str, models: Models, shards: Shards, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = models(kind) if kind == "attention_bias" else shards(kind, "torch", 3, 1)
    ok("convert", "--load", source, "--save", tmp_path / "b", "--to", "hf")
    logits, ids = [], AutoTokenizer.from_pretrained(tmp_path / "b")(pico.TEXT)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(models(kind))(pico.TEXT)["input_ids"]
    for path in (tmp_path / "b", models(kind)):
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        with torch.no_grad():
            logits.append(model(torch.arange(48)[None] * 2).logits)
    assert torch.equal(*logits)
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["head_dim"] == 8


def test_a_tied_source_that_stores_its_output_layer_too_comes_back_without_the_copy(
    models: Models, tmp_path: Path
) -> None:
    shutil.copytree(models("tied"), tmp_path / "s")
    found = tensors(models("tied"))
    copy = {"lm_head.weight": found["model.embed_tokens.weight"].clone()}
    save_file(found | copy, tmp_path / "s/model.safetensors", {"format": "pt"})
    ok("convert", "--load", tmp_path / "s", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), found)


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_dtype_casts_each_value_once_and_keep_changes_nothing(
    dtype: str, torch_dtype: torch.dtype, models: Models, tmp_path: Path
) -> None:
    to = ("--to", "megatron", TP, 3, "--dtype", dtype)
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "m", *to)
    ok(
        "convert",
        "--load",
        tmp_path / "m",
        "--save",
        tmp_path / "b",
        "--to",
        "hf",
        "--dtype",
        "keep",
    )
    wanted = {name: x.to(torch_dtype) for name, x in tensors(models("gqa")).items()}
    assert_same(tensors(tmp_path / "b"), wanted)
