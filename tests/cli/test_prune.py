"""`prune`, `reshard` and `verify`: what travels along, and whose plan fits whom."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.pico import assert_same, directory_bytes, ok, refused, tensors

Models, Shards, Plans = Callable[[str], Path], Callable[..., Path], Callable[[str], Path]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
FLAGS = ("--ffn-hidden-size-remain", 60, "--drop-layers", "2", "--seed", 9)


@pytest.fixture(scope="module")
def pruned(models: Models, plans: Plans, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """gqa by its plan, as a Hugging Face directory."""
    out = tmp_path_factory.mktemp("pruned") / "hf"
    ok("prune", "--load", models("gqa"), "--plan", plans("gqa"), "--save", out, "--to", "hf")
    return out


def test_the_plans_own_flags_make_the_plan_on_the_way(models: Models, tmp_path: Path) -> None:
    load = ("--load", models("gqa"))
    ok("plan", *load, "--save", tmp_path / "p.json", *FLAGS)
    ok("prune", *load, "--save", tmp_path / "a", "--to", "hf", "--plan", tmp_path / "p.json")
    ok("prune", *load, "--save", tmp_path / "b", "--to", "hf", *FLAGS)
    assert directory_bytes(tmp_path / "a") == directory_bytes(tmp_path / "b")
    assert (tmp_path / "a/plan.json").read_bytes() == (tmp_path / "p.json").read_bytes()


def test_plan_and_tokenizer_survive_resharding_and_export(
    models: Models, plans: Plans, pruned: Path, tmp_path: Path
) -> None:
    ok("convert", "--load", pruned, "--save", tmp_path / "a", "--to", "megatron", TP, 3)
    ok("reshard", "--load", tmp_path / "a", "--save", tmp_path / "b", PP, 3)
    to = ("--ckpt-format", "torch", TP, 3, PP, 3)
    ok("reshard", "--load", tmp_path / "b", "--save", tmp_path / "c", *to)
    ok("convert", "--load", tmp_path / "c", "--save", tmp_path / "d", "--to", "hf")
    assert_same(tensors(tmp_path / "d"), tensors(pruned))
    plan = plans("gqa").read_bytes()
    for place in ("a/iter_0000001", "b/iter_0000001", "c/iter_0000001", "d"):
        assert (tmp_path / place / "plan.json").read_bytes() == plan
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "d" / name).read_bytes() == (models("gqa") / name).read_bytes()


def test_a_cast_checkpoint_keeps_its_plan(plans: Plans, pruned: Path, tmp_path: Path) -> None:
    ok("convert", "--load", pruned, "--save", tmp_path / "b", "--to", "hf", "--dtype", "bf16")
    assert (tmp_path / "b/plan.json").read_bytes() == plans("gqa").read_bytes()
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"


def test_the_digest_of_the_plan_travels_in_megatrons_arguments(
    plans: Plans, pruned: Path, tmp_path: Path
) -> None:
    to = ("--to", "megatron", "--ckpt-format", "torch")
    ok("convert", "--load", pruned, "--save", tmp_path / "m", *to)
    file = tmp_path / "m/iter_0000001/mp_rank_00/model_optim_rng.pt"
    args = torch.load(file, weights_only=False)["args"]
    assert args.prune_plan_digest == hashlib.sha256(plans("gqa").read_bytes()).hexdigest()
    assert (args.vocab_size, args.padded_vocab_size, args.hidden_size) == (379, 384, 36)


def test_reshard_keeps_the_sources_format(shards: Shards, tmp_path: Path) -> None:
    for ckpt_format, file in (
        ("torch", "mp_rank_00/model_optim_rng.pt"),
        ("torch_dist", ".metadata"),
    ):
        out = tmp_path / ckpt_format
        ok("reshard", "--load", shards("gqa", ckpt_format, 3, 1), "--save", out)
        assert (out / "iter_0000001" / file).exists()


@pytest.mark.parametrize(
    ("stage", "flags", "says"),
    [
        ("reshard", (), "is a Hugging Face directory; use convert --to megatron"),
        ("convert", ("--to", "hf", TP, 3), "a Hugging Face directory is not split by rank"),
        ("convert", ("--to", "megatron", TP, 4), "4 does not divide num_attention_heads 6; legal"),
        ("convert", ("--to", "megatron", PP, 3), "4 layers do not divide over"),
        ("convert", ("--to", "hf", "--max-shard-size", "5"), "'5': wanted a size such as 5GB"),
        ("prune", ("--to", "hf"), "nothing says what to keep"),
        ("prune", ("--to", "hf", "--plan", "p", "--drop-layers", 1), "give one of the two"),
        ("prune", ("--to", "hf", "--plan", "none.json"), "--plan none.json: No such file"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    stage: str, flags: tuple, says: str, models: Models, tmp_path: Path
) -> None:
    refused(stage, "--load", models("gqa"), "--save", tmp_path / "x", *flags, says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_megatron_has_no_arguments_for_is_refused(
    models: Models, tmp_path: Path
) -> None:
    """Biases in attention alone."""
    save = ("--save", tmp_path / "x", "--to", "megatron")
    says = "qkv True, proj True, mlp False. Prune it with --to hf"
    refused("convert", "--load", models("attention_bias"), *save, says=says)


@pytest.mark.parametrize(
    ("other", "says"),
    [("mha", "the plan was made for"), ("twin", "same shape, other weights: its digest is")],
)
def test_a_plan_for_another_model_is_refused(
    other: str, says: str, models: Models, plans: Plans, tmp_path: Path
) -> None:
    given = ("--plan", plans("gqa"), "--save", tmp_path / "x", "--to", "hf")
    refused("prune", "--load", models(other), *given, says=says)
    assert not (tmp_path / "x").exists()


def write_value(folder: Path, name: str, place: int, value: float) -> None:
    """Change one float32 of a safetensors file where it lies."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    data = 8 + int.from_bytes(content[:8], "little")
    at = data + json.loads(content[8:data])[name]["data_offsets"][0] + 4 * place
    content[at : at + 4] = struct.pack("<f", value)
    file.write_bytes(content)


@pytest.mark.parametrize("edit", ["value", "nan", "config", "tokenizer", "missing file"])
def test_verify_names_what_differs_and_exits_3(
    edit: str, models: Models, plans: Plans, pruned: Path, tmp_path: Path
) -> None:
    shutil.copytree(pruned, tmp_path / "p")
    says = ""
    if edit in ("value", "nan"):
        name = "model.layers.1.mlp.up_proj.weight"
        place = 4 * 36 + 5
        write_value(tmp_path / "p", name, place, float("nan") if edit == "nan" else 7.0)
        says = "1 of 2160 values are not finite" if edit == "nan" else f"{name} at (4, 5): is 7.0"
    elif edit == "config":
        path = tmp_path / "p/config.json"
        path.write_text(path.read_text().replace("50000", "60000"))
        says = "config.json: its SHA-256 is not the manifest's"
    elif edit == "tokenizer":
        (tmp_path / "p/tokenizer.json").write_text("{}")
        says = "tokenizer.json: 2 bytes, manifest says"
    else:
        (tmp_path / "p/tokenizer.json").unlink()
        says = "tokenizer.json: in the manifest, not on disk"
    given = ("--source", models("gqa"), "--plan", plans("gqa"))
    message = refused("verify", "--load", tmp_path / "p", *given, says=says, code=3)
    assert str(tmp_path / "p") in message


def test_verify_refuses_another_plan_and_another_shape(
    models: Models, plans: Plans, pruned: Path, tmp_path: Path
) -> None:
    plan, other = json.loads(plans("gqa").read_text()), tmp_path / "o.json"
    given = ("--load", models("gqa"), "--save", other, "--balance-for", 3)
    same_shape = (
        *("--hidden-size-remain", 36, "--num-attention-heads-remain", 3),
        *("--ffn-hidden-size-remain", 60, "--drop-layers", 1),
    )
    ok("plan", *given, *same_shape, "--seed", 4)
    assert json.loads(other.read_text())["target"] == plan["target"]
    against = ("--source", models("gqa"), "--plan", other)
    refused("verify", "--load", pruned, *against, says="another plan", code=3)
    ok("plan", *given, "--overwrite", "--hidden-size-remain", 24)
    refused("verify", "--load", pruned, *against, says="the plan makes", code=3)


def test_verify_without_a_manifest_still_compares_every_value(
    models: Models, plans: Plans, pruned: Path, tmp_path: Path
) -> None:
    shutil.copytree(pruned, tmp_path / "p", ignore=shutil.ignore_patterns("manifest.json"))
    given = ("--source", models("gqa"), "--plan", plans("gqa"))
    assert "no manifest" in ok("verify", "--load", tmp_path / "p", *given).out


def test_verify_accepts_a_cast_and_a_layout(
    models: Models, plans: Plans, shards: Shards, tmp_path: Path
) -> None:
    to = ("--to", "megatron", "--ckpt-format", "torch", TP, 3, PP, 3, "--dtype", "bf16")
    given = ("--plan", plans("gqa"), "--save", tmp_path / "p", *to)
    ok("prune", "--load", shards("gqa", "torch_dist", 3, 1), *given)
    against = ("--source", shards("gqa"), "--plan", plans("gqa"))
    assert "files as in the manifest" in ok("verify", "--load", tmp_path / "p", *against).out
