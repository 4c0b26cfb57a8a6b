"""What travels with a model: all that save_pretrained writes, nothing that a link leads to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_prune.errors import CheckpointError
from megatron_prune.store import open_source
from tests.pico import directory_bytes, ok

Models = Callable[[str], Path]


def saved(model: Path, path: Path) -> Path:
    """What transformers writes of a model, its tokenizer and its generation config, and reads."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = {"default": "A", "tool_use": "B", "rag": "C"}
    tokenizer.save_pretrained(path)
    GenerationConfig(eos_token_id=1, temperature=0.5, do_sample=True).save_pretrained(path)
    (path / "custom_generate").mkdir()
    (path / "custom_generate" / "generate.py").write_text("def generate(model): ...\n")
    (path / "preprocessor_config.json").write_text("{}")
    return path


def test_all_that_transformers_writes_travels(models: Models, tmp_path: Path) -> None:
    path = saved(models("gqa"), tmp_path / "hf")
    wanted = directory_bytes(path)
    assert {"additional_chat_templates/rag.jinja", "custom_generate/generate.py"} <= set(wanted)
    ok("convert", "--load", path, "--save", tmp_path / "m", "--to", "megatron")
    ok("reshard", "--load", tmp_path / "m", "--save", tmp_path / "m3",
       "--tensor-model-parallel-size", 3)  # fmt: skip
    ok("convert", "--load", tmp_path / "m3", "--save", tmp_path / "back", "--to", "hf")
    ok("prune", "--load", path, "--save", tmp_path / "p", "--to", "hf", "--drop-layers", 1)
    for out in ("back", "p"):
        found = directory_bytes(tmp_path / out)
        for name in set(wanted) - {"config.json", "model.safetensors", "README.md"}:
            assert found[name] == wanted[name], name
        template = AutoTokenizer.from_pretrained(tmp_path / out).chat_template
        assert template == {"default": "A", "tool_use": "B", "rag": "C"}


@pytest.mark.parametrize(
    "link",
    [
        "LICENSE", "config.json", "generation_config.json", "plan.json",
        "additional_chat_templates/x.jinja", "additional_chat_templates", "custom_generate",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_link_out_of_the_models_directory_is_refused(
    link: str, kind: str, models: Models, tmp_path: Path
) -> None:
    path = root = Path(shutil.copytree(models("gqa"), tmp_path / "hf"))
    if kind == "megatron":
        root = tmp_path / "m"
        ok("convert", "--load", path, "--save", root, "--to", "megatron")
        step = root / "iter_0000001"
        (step / "manifest.json").unlink()
        path = step if link == "plan.json" else step / "hf"
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text('{"version": 1, "kept": {}, "source_digest": ""}')
    place = path / link
    place.parent.mkdir(exist_ok=True)
    if link in ("additional_chat_templates", "custom_generate"):
        place.symlink_to(secret)
    else:
        if place.exists():
            shutil.copy(place, secret / "key")
            place.unlink()
        place.symlink_to(os.path.relpath(secret / "key", place.parent))
    with pytest.raises(CheckpointError, match="is a link out of"):
        open_source(root)


def test_a_whole_directory_of_companions_that_is_a_link_is_refused(
    models: Models, tmp_path: Path
) -> None:
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "m", "--to", "megatron")
    companions = tmp_path / "m/iter_0000001/hf"
    companions.rename(tmp_path / "elsewhere")
    companions.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link out of"):
        open_source(tmp_path / "m")


def test_links_inside_and_into_the_hubs_cache_are_followed(models: Models, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    for number, file in enumerate(models("gqa").iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    (blobs / "t").write_text("B")
    (snapshot / "additional_chat_templates/x.jinja").symlink_to("../../../blobs/t")
    (snapshot / "LICENSE").symlink_to("config.json")
    found = open_source(snapshot).companion_files
    assert {"additional_chat_templates/x.jinja", "LICENSE", "tokenizer.json"} <= set(found)
