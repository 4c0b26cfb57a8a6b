"""Checkpoints that are not whole, not one model, or point outside themselves (F6, F8, F10)."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_prune.store import hf
from tests.pico import edit_config, ok, refused, stock_copy, tensors

Models, Shards = Callable[[str], Path], Callable[..., Path]
DOWN = "model.layers.3.mlp.down_proj.weight"
FC2 = "decoder.layers.mlp.linear_fc2.weight"
RANK = "iter_0000001/mp_rank_01/model_optim_rng.pt"


@pytest.fixture()
def copy(models: Models, shards: Shards, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of gqa to break, without a manifest: ``copy()`` or ``copy(format, tp, pp)``."""

    def make(*layout: Any) -> Path:
        source = shards("gqa", *layout) if layout else models("gqa")
        ignore = shutil.ignore_patterns("manifest.json")
        return Path(shutil.copytree(source, tmp_path / "c", ignore=ignore))

    return make


def refuse(path: Path, says: str, code: int = 3) -> None:
    """No stage reads it, and none leaves anything."""
    out = path.parent / "out"
    refused("inspect", path, says=says, code=code)
    refused("convert", "--load", path, "--save", out, "--to", "hf", says=says, code=code)
    refused("plan", "--load", path, "--save", out, says=says, code=code)
    assert not out.exists()


def test_hf_without_a_tensor_or_with_one_too_many(copy: Callable[..., Path]) -> None:
    """transformers draws what is missing at random and drops what is too many."""
    path = copy()
    found = tensors(path)
    more = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48), "w": torch.zeros(1)}
    save_file({n: x for n, x in found.items() if n != DOWN} | more, path / "model.safetensors")
    missing = f"1 tensors missing ['{DOWN}'], 2 unexpected "
    refuse(path, missing + "['model.layers.0.self_attn.q_proj.bias', 'w']")


def sharded(copy: Callable[..., Path]) -> tuple[Path, dict[str, str]]:
    """gqa in two safetensors files with an index."""
    path = copy()
    found = tensors(path)
    (path / "model.safetensors").unlink()
    weight_map = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(found)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: x for n, x in found.items() if weight_map[n] == file}, path / file)
    write_index(path, weight_map)
    return path, weight_map


def write_index(path: Path, weight_map: Any, name: str = "model.safetensors.index.json") -> None:
    (path / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_hf_without_a_file_that_the_index_names(copy: Callable[..., Path]) -> None:
    path, weight_map = sharded(copy)
    (path / "b.safetensors").unlink()
    count = sum(file == "b.safetensors" for file in weight_map.values())
    refuse(path, f"{path}: b.safetensors is missing, with {count} tensors (")


def test_hf_whose_index_lacks_a_tensor(copy: Callable[..., Path]) -> None:
    path, weight_map = sharded(copy)
    del weight_map[DOWN]
    write_index(path, weight_map)
    refuse(path, f"1 tensors missing ['{DOWN}']")


def test_hf_whose_index_points_to_the_wrong_file(copy: Callable[..., Path]) -> None:
    path, weight_map = sharded(copy)
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    weight_map[DOWN] = other[weight_map[DOWN]]
    write_index(path, weight_map)
    refuse(path, f"{path / weight_map[DOWN]}: {DOWN} is not in it; the index says it is")


@pytest.mark.parametrize("weight_map", [None, [], "x", 7])
def test_hf_whose_index_is_none(weight_map: Any, copy: Callable[..., Path]) -> None:
    path, _ = sharded(copy)
    write_index(path, weight_map)
    refuse(path, "not an index of weights")


def test_hf_without_weights(copy: Callable[..., Path]) -> None:
    path = copy()
    (path / "model.safetensors").unlink()
    refuse(path, "no model.safetensors, model.safetensors.index.json or pytorch_model.bin", code=2)


def test_quantised_tensors_are_no_weights(copy: Callable[..., Path]) -> None:
    path = copy()
    found = tensors(path)
    save_file(found | {DOWN: found[DOWN].to(torch.int8)}, path / "model.safetensors")
    refuse(path, f"{DOWN} is torch.uint8; wanted a floating-point model", code=2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": 40}, "is (379, 48), config.json says (379, 40); one of the two"),
        ({"num_key_value_heads": 2}, "k_proj.weight is (24, 48), config.json says (16, 48)"),
        ({"intermediate_size": 90}, "gate_proj.weight is (96, 48), config.json says (90, 48)"),
        ({"vocab_size": 384}, "is (379, 48), config.json says (384, 48)"),
        ({"num_hidden_layers": 3}, "0 tensors missing [], 9 unexpected ['model.layers.3."),
        ({"num_hidden_layers": 5}, "9 tensors missing ['model.layers.4."),
        ({"tie_word_embeddings": True, "vocab_size": 378}, "config.json says (378, 48)"),
        ({"attention_bias": True}, "16 tensors missing ['model.layers.0.self_attn.q_proj.bias'"),
    ],
)
def test_hf_whose_config_describes_another_model(
    changes: dict, says: str, copy: Callable[..., Path]
) -> None:
    path = copy()
    edit_config(path / "config.json", **changes)
    refuse(path, says)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; wanted one of llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'; wanted silu"),
        ({"num_attention_heads": 7}, "7 is not a multiple of num_query_groups 3"),
        ({"num_attention_heads": 0}, "config.json: "),
        ({"num_attention_heads": None}, "config.json: "),
        ({"hidden_size": "48"}, "hidden_size is '48'; wanted a positive integer"),
        ({"rope_parameters": 7}, "config.json: "),
        (
            {"rope_parameters": {"rope_theta": "x"}},
            "not a model configuration: could not",
        ),
        (
            {"max_position_embeddings": 1e999},
            "not a model configuration: OverflowError",
        ),
    ],
)
def test_a_config_that_describes_no_model_we_know(
    changes: dict, says: str, copy: Callable[..., Path]
) -> None:
    path = copy()
    edit_config(path / "config.json", **changes)
    refuse(path, says, code=2)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_none(content: bytes, copy: Callable[..., Path]) -> None:
    path = copy()
    (path / "config.json").write_bytes(content)
    refuse(path, f"{path / 'config.json'}: not a model configuration", code=2)


# ---------------------------------------------------------------- Megatron's formats


def edit_rank(path: Path, change: Callable[[dict[str, Any]], object], rank: str = RANK) -> None:
    state = torch.load(path / rank, weights_only=False)
    change(state)
    torch.save(state, path / rank)


def edit_index(path: Path, change: Callable[[Any], object]) -> None:
    file = path / "iter_0000001/.metadata"
    index = pickle.loads(file.read_bytes())
    change(index)
    file.write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_01", "mp_rank_02"])
def test_legacy_without_the_directory_of_a_rank(rank: str, copy: Callable[..., Path]) -> None:
    path = copy("torch", 3, 1)
    shutil.rmtree(path / "iter_0000001" / rank)
    refuse(path, f"3 x 1 tensor x pipeline shards, {rank}/model_optim_rng.pt is missing")


@pytest.mark.parametrize("missing", ["mp_rank_00_001", "mp_rank_02_000", "mp_rank_02_00?"])
def test_legacy_without_a_stage(missing: str, copy: Callable[..., Path]) -> None:
    path = copy("torch", 3, 2)
    for rank in (path / "iter_0000001").glob(missing):
        shutil.rmtree(rank)
    named = missing.replace("?", "0")
    refuse(path, f"3 x 2 tensor x pipeline shards, {named}/model_optim_rng.pt is missing")


def test_legacy_without_the_whole_second_stage(copy: Callable[..., Path]) -> None:
    path = copy("torch", 3, 2)
    for rank in (path / "iter_0000001").glob("mp_rank_0?_001"):
        shutil.rmtree(rank)
    refuse(path, "mp_rank_00_001/model_optim_rng.pt is missing")


def test_legacy_without_a_tensor_or_with_one_too_many(copy: Callable[..., Path]) -> None:
    path = copy("torch", 3, 1)
    bias, fc2 = "self_attention.linear_qkv.bias", "mlp.linear_fc2.weight"

    def change(state: dict[str, Any]) -> None:
        del state["model"][f"decoder.layers.2.{fc2}"]
        state["model"][f"decoder.layers.0.{bias}"] = torch.zeros(1)

    edit_rank(path, change)
    missing = f"{path / RANK}: 1 tensors missing ['decoder.layers.2.{fc2}'], 1 unexpected "
    refuse(path, missing + f"['decoder.layers.0.{bias}']")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("model"), "holds no model"),
        (lambda s: s.update(model=[]), "holds no model"),
        (lambda s: s.update(model={7: torch.zeros(1)}), "holds no model"),
        (lambda s: s.update(model={}), "tensors missing"),
        (lambda s: s["model"].update({"output_layer.weight": None}), "['output_layer.weight']"),
        (
            lambda s: s["model"].update({"output_layer.weight": torch.zeros(7, 48)}),
            "output_layer.weight: tp_rank 1 stores (7, 48), its configuration says (128, 48)",
        ),
        (
            lambda s: s["model"].update({"decoder.layers.9.mlp.linear_fc2.weight": torch.zeros(1)}),
            "1 unexpected ['decoder.layers.9.mlp.linear_fc2.weight']",
        ),
    ],
)
def test_a_legacy_rank_that_holds_something_else(
    change: Callable[[dict], object], says: str, copy: Callable[..., Path]
) -> None:
    path = copy("torch", 3, 1)
    edit_rank(path, change)
    refuse(path, says)


@pytest.mark.parametrize("rank", ["mp_rank_00", "mp_rank_02"])
@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, None], ids=str)
def test_a_legacy_file_that_is_no_state(content: Any, rank: str, copy: Callable[..., Path]) -> None:
    path = copy("torch", 3, 1)
    torch.save(content, path / "iter_0000001" / rank / "model_optim_rng.pt")
    refuse(path, f"{rank}/model_optim_rng.pt: holds no model")


def test_optimizer_state_is_no_unexpected_tensor(copy: Callable[..., Path]) -> None:
    path = copy("torch", 3, 1)
    edit_rank(path, lambda state: state.update(optimizer={"step": torch.zeros(1)}))
    edit_rank(path, lambda state: state["model"].update({"rotary_pos_emb.inv_freq": torch.ones(4)}))
    ok("inspect", path)


def test_torch_dist_without_a_key_or_with_one_too_many(copy: Callable[..., Path]) -> None:
    path = copy("torch_dist", 3, 1)
    bias = "decoder.layers.self_attention.linear_qkv.bias"

    def change(index: Any) -> None:
        index.state_dict_metadata[bias] = index.state_dict_metadata.pop(FC2)
        for place in [place for place in index.storage_data if place.fqn == FC2]:
            moved = type(place)(bias, place.offset, place.index)
            index.storage_data[moved] = index.storage_data.pop(place)

    edit_index(path, change)
    refuse(path, f".metadata: 1 tensors missing ['{FC2}'], 1 unexpected ['{bias}']")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda i: i.storage_data.clear(), "lies in no file"),
        (lambda i: i.state_dict_metadata.clear(), "tensors missing"),
        (lambda i: setattr(i, "storage_data", None), ".metadata: "),
        (lambda i: setattr(i, "state_dict_metadata", [1]), ".metadata: "),
        (lambda i: i.state_dict_metadata[FC2].chunks.pop(), "are in no shard"),
        (
            lambda i: setattr(i.state_dict_metadata[FC2], "size", torch.Size([4, 48, 7])),
            "a chunk of",
        ),
        (
            lambda i: setattr(i.state_dict_metadata[FC2], "size", torch.Size([5, 48, 96])),
            "5 layers",
        ),
        (lambda i: setattr(i.state_dict_metadata[FC2].properties, "dtype", "f"), "of dtype 'f'"),
    ],
)
def test_a_torch_dist_index_that_contradicts_itself(
    change: Callable[[Any], object], says: str, copy: Callable[..., Path]
) -> None:
    path = copy("torch_dist", 3, 1)
    edit_index(path, change)
    out = ("--save", path.parent / "out", "--to", "hf")
    refused("convert", "--load", path, *out, says=says, code=3)
    assert not (path.parent / "out").exists()


@pytest.mark.parametrize("file", ["__0_0.distcp", "__2_0.distcp", "common.pt"])
def test_torch_dist_without_a_file(file: str, copy: Callable[..., Path]) -> None:
    path = copy("torch_dist", 3, 1)
    (path / "iter_0000001" / file).unlink()
    refuse(path, file)


def test_another_sharded_backend_is_refused(copy: Callable[..., Path]) -> None:
    path = copy("torch_dist", 3, 1)
    edit_config(path / "iter_0000001/metadata.json", sharded_backend="zarr")
    refuse(path, "sharded backend 'zarr'; wanted torch_dist", code=2)


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3}, {"num_hidden_layers": 5}, {"hidden_size": 40},
        {"intermediate_size": 90}, {"num_key_value_heads": 2}, {"num_key_value_heads": 6},
        {"vocab_size": 390}, {"head_dim": 4}, {"tie_word_embeddings": True, "vocab_size": 500},
        {"attention_bias": True}, {"mlp_bias": True},
    ],
    ids=str,
)  # fmt: skip
def test_megatron_whose_config_describes_another_model(
    changes: dict, ckpt_format: str, copy: Callable[..., Path]
) -> None:
    path = copy(ckpt_format, 3, 1)
    edit_config(path / "iter_0000001/hf/config.json", **changes)
    refuse(path, str(path))


@pytest.mark.parametrize("layout", [(), ("torch_dist", 3, 1), ("torch", 3, 1)])
def test_other_heads_over_the_same_tensors_are_caught_by_the_manifest(
    layout: tuple, models: Models, shards: Shards, tmp_path: Path
) -> None:
    """12 heads of 4 channels have the tensors of 6 heads of 8; only the function differs."""
    if layout:
        shutil.copytree(shards("gqa", *layout), tmp_path / "c")
        config = tmp_path / "c/iter_0000001/hf/config.json"
    else:
        ok("convert", "--load", models("gqa"), "--save", tmp_path / "c", "--to", "hf")
        config = tmp_path / "c/config.json"
    before = config.read_text()
    text = before.replace('"head_dim": 8', '"head_dim": 4')
    text = text.replace('"num_attention_heads": 6', '"num_attention_heads": 12')
    text = text.replace('"num_key_value_heads": 3', '"num_key_value_heads": 6')
    config.write_text(text[: text.rindex("}")].rstrip() + "}")  # of the same size: no other clue
    config.write_text(config.read_text().ljust(len(before)))
    assert len(config.read_text()) == len(before) and text != before
    refuse(tmp_path / "c", "its configuration says shape {'num_layers': 4")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"swiglu": False}, "args.swiglu is False; this reads only SwiGLU models"),
        ({"normalization": "LayerNorm"}, "only RMSNorm models"),
        ({"num_experts": 8}, "no mixture of experts"),
        ({"window_size": (20, 5)}, "args.window_size is (20, 5); wanted two integers"),
        ({"window_size": "20,0"}, "args.window_size is '20,0'; wanted two integers"),
        ({"window_size": 20}, "args.window_size is 20; wanted two integers"),
        ({"window_size": (20.0, 0)}, "args.window_size is (20.0, 0); wanted two integers"),
        ({"hidden_size": None}, "its arguments lack hidden_size"),
        ({"num_query_groups": 4}, "6 is not a multiple of num_query_groups 4"),
        ({"num_query_groups": 2}, "its configuration says"),
    ],
)
def test_stock_arguments_that_describe_another_model(
    change: dict, says: str, shards: Shards, tmp_path: Path
) -> None:
    path = stock_copy(shards("gqa", "torch_dist", 3, 1), tmp_path / "s")
    file = path / "iter_0000001/common.pt"
    common = torch.load(file, weights_only=False)
    for name, value in change.items():
        setattr(common["args"], name, value)
    torch.save(common, file)
    refused("inspect", path, says=says, code=(2, 3))


# ---------------------------------------------------------------- pointing outside (F10)

OUTSIDE = [
    "../outside.safetensors", "../../outside.safetensors", "sub/../../outside.safetensors",
    "{parent}/outside.safetensors", "/etc/passwd", "link.safetensors", "sub/inside.safetensors",
    "..", ".", "", "a\\b.safetensors", "..\\outside.safetensors", "outside.safetensors\0",
    "~/outside.safetensors", "file:///etc/passwd",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_points_outside_is_refused_and_nothing_is_opened(
    name: str, kind: str, copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file outside is a whole and fitting one, so that nothing but the place is wrong."""
    path = copy()
    outside = path.parent / "outside.safetensors"
    (path / "model.safetensors").rename(outside)
    (path / "sub").mkdir()
    (path / "link.safetensors").symlink_to(outside)
    opened = []
    monkeypatch.setattr(hf, "_open_file", lambda file: opened.append(file) or {})
    weight_map = dict.fromkeys(tensors(path.parent), name.format(parent=path.parent))
    index = (
        "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    )
    write_index(path, weight_map, index)
    refuse(path, "outside its directory; not opened")
    assert opened == []


def test_the_hubs_own_links_are_followed(models: Models, tmp_path: Path) -> None:
    """A snapshot is a directory of links into its blobs."""
    snapshot, blobs = tmp_path / "snapshots/abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in models("gqa").iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob-{file.name}")
    write_index(snapshot, dict.fromkeys(tensors(models("gqa")), "model.safetensors"))
    ok("inspect", snapshot)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "", "a\\b", "a\0", 7])
def test_a_torch_dist_index_that_points_outside_is_refused(
    name: Any, copy: Callable[..., Path]
) -> None:
    path = copy("torch_dist", 3, 1)

    def change(index: Any) -> None:
        for info in index.storage_data.values():
            info.relative_path = name

    edit_index(path, change)
    refuse(path, f"points to {name!r}, outside its directory")
