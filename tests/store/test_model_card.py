"""README.md of an export says what the checkpoint says, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pico import make_model, ok, refused
from tests.sparse import make_sparse

CARD = """---
license: other
license_name: pico
license_link: LICENSE
language: [en, fr]
base_model: some/ancestor
tags: [conversational]
datasets: [some/text]
---
# The source
"""


def header(folder: Path) -> dict[str, Any]:
    """The card's YAML, read by a YAML library."""
    first, text, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert first == ""
    return dict(yaml.safe_load(text))


def body(folder: Path) -> str:
    return (folder / "README.md").read_text().split("---\n", 2)[2]


def rows(folder: Path) -> dict[str, list[str]]:
    """Of the table of sizes."""
    cells = [line.strip("| ").split(" | ") for line in body(folder).splitlines() if line[:1] == "|"]
    return {cell[0]: cell[1:] for cell in cells[2:]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("card") / "source", "gqa")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture(scope="module")
def pruned(source: Path) -> Path:
    out = source.with_name("pruned")
    flags = ("--hidden-size-remain", 36, "--ffn-hidden-size-remain", 60, "--drop-layers", 1)
    done = ok("prune", "--load", source, "--save", out, "--to", "hf", *flags, "--seed", 7)
    assert "README.md: the source's describes another model" in done.err
    return out


def parameters(folder: Path) -> int:
    """As transformers counts them."""
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(folder).num_parameters())


def test_a_pruned_model_says_what_it_was_and_what_it_is(source: Path, pruned: Path) -> None:
    told = rows(pruned)
    assert told["hidden_size"] == ["48", "36"]
    assert told["ffn_hidden_size"] == ["96", "60"]
    assert told["num_layers"] == ["4", "3"]
    assert told["parameters"] == [f"{parameters(source):,}", f"{parameters(pruned):,}"]
    plan = json.loads((pruned / "plan.json").read_text())
    digest = hashlib.sha256((pruned / "plan.json").read_bytes()).hexdigest()
    assert digest in body(pruned) and plan["source_digest"] in body(pruned)
    assert "criterion `random` (seed 7)" in body(pruned)


def test_the_header_takes_the_licence_along_and_leaves_the_rest(source: Path, pruned: Path) -> None:
    assert header(pruned) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-prune", "pruned"],
        "license": "other",
        "license_name": "pico",
        "license_link": "LICENSE",
        "language": ["en", "fr"],
    }
    assert "No licence" not in body(pruned) and "whose name is not known" in body(pruned)
    assert (source / "README.md").read_text() == CARD


def test_a_sparse_model_says_so_and_what_that_does_not_change(
    source: Path, pruned: Path, tmp_path: Path
) -> None:
    record = make_sparse(pruned, tmp_path / "s")
    ok("convert", "--load", tmp_path / "s", "--save", tmp_path / "m", "--to", "megatron")
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "hf", "--to", "hf")
    for folder in (tmp_path / "s", tmp_path / "hf"):
        text = body(folder)
        assert header(folder)["tags"] == ["megatron-prune", "pruned", "sparse"]
        assert text.startswith("\n# A llama model, pruned, sparse\n")
        assert "50.00% of the weights of 21 linears" in text and "wanda, 2:4." in text
        assert "of every 4 consecutive inputs of a row at most 2" in text
        assert "as large as those of the dense model, and it runs no faster" in text
        assert (
            "`sparsity.json` says how the zeros were chosen" in text
            and record.source_digest in text
        )
        assert "--keep-zeros" not in text
    make_sparse(source, tmp_path / "o", pattern=None)
    assert header(tmp_path / "o")["tags"] == ["megatron-prune", "sparse"]
    assert "consecutive" not in body(tmp_path / "o")
    assert "spars" not in (pruned / "README.md").read_text()


def test_a_base_model_is_linked_and_kept_by_later_exports(source: Path, tmp_path: Path) -> None:
    flags = ("--to", "hf", "--base-model", "org/pico")
    ok("convert", "--load", source, "--save", tmp_path / "a", *flags)
    assert header(tmp_path / "a")["base_model"] == "org/pico"
    card = (tmp_path / "a/README.md").read_bytes()
    assert "[org/pico](https://huggingface.co/org/pico)" in body(tmp_path / "a")
    ok("convert", "--load", tmp_path / "a", "--save", tmp_path / "b", "--to", "megatron")
    assert (tmp_path / "b/iter_0000001/hf/README.md").read_bytes() == card
    done = ok("convert", "--load", tmp_path / "b", "--save", tmp_path / "c", "--to", "hf")
    assert "README.md" not in done.err, "a card of ours is renewed without a word"
    assert (tmp_path / "c/README.md").read_bytes() == card


def test_a_card_is_for_people_to_write_on(source: Path, pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text().replace("license_name: pico", "license_name: mine") + "Good.")
    ok("verify", "--load", tmp_path / "a", "--source", source, "--plan", pruned / "plan.json")
    ok("convert", "--load", tmp_path / "a", "--save", tmp_path / "b", "--to", "hf")
    assert header(tmp_path / "b")["license_name"] == "mine"


def test_a_model_in_the_hubs_cache_has_its_name_from_there(source: Path, tmp_path: Path) -> None:
    cached = tmp_path / "hub" / "models--org--pico" / "snapshots" / "1f2e3d"
    shutil.copytree(source, cached)
    ok("convert", "--load", cached, "--save", tmp_path / "ckpt", "--to", "megatron")
    ok("convert", "--load", tmp_path / "ckpt", "--save", tmp_path / "out", "--to", "hf")
    assert header(tmp_path / "out")["base_model"] == "org/pico"
    assert header(tmp_path / "out")["license"] == "other"


def test_the_code_it_gives_loads_the_model(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = body(pruned).split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(pruned)
    found: dict[str, Any] = {}
    exec(code, found)
    assert found["model"].config.hidden_size == 36
    assert found["tokenizer"]("fox")["input_ids"]


@pytest.mark.parametrize(
    "card",
    [
        None, b"", b"# no header", b"---\n[: {\n---\n", b"---\n- a\n---\n", b"---\n\xff\n---\n",
        b"---\n1: 2\n---\n", b"---\ntags: 3\nlicense:\n---\n",
    ],
)  # fmt: skip
def test_without_a_readable_card_the_licence_is_said_to_be_unknown(
    models, tmp_path: Path, card: bytes | None
) -> None:
    folder = shutil.copytree(models("gqa"), tmp_path / "m")
    if card is not None:
        (folder / "README.md").write_bytes(card)
    ok("convert", "--load", folder, "--save", tmp_path / "out", "--to", "hf")
    assert set(header(tmp_path / "out")) == {"library_name", "pipeline_tag", "tags"}
    assert "No licence is given here" in body(tmp_path / "out")
    assert set(rows(tmp_path / "out")["hidden_size"]) == {"48"}


def test_layers_of_different_widths_say_how_they_load(models, tmp_path: Path) -> None:
    plan, out = tmp_path / "plan.json", tmp_path / "out"
    values = {"--ffn-hidden-size-remain": 60, "--seed": 3}
    ok("plan", "--load", models("gqa"), "--save", plan, *(x for i in values.items() for x in i))
    ok("prune", "--load", models("gqa"), "--plan", plan, "--save", out, "--to", "hf")
    assert "trust_remote_code" not in body(out)
    kept = json.loads(plan.read_text())
    kept["uniform"] = False
    kept["kept"]["ffn"]["0"] = kept["kept"]["ffn"]["0"][:50]
    kept["target"]["ffn_per_layer"] = [50, 60, 60, 60]
    plan.write_text(json.dumps(kept))
    ok("prune", "--load", models("gqa"), "--plan", plan, "--save", tmp_path / "b", "--to", "hf")
    assert "50, 60, 60, 60" in body(tmp_path / "b") and "trust_remote_code" in body(tmp_path / "b")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--to", "megatron", "--push-to-hub", "a/b"), "--push-to-hub goes with --to hf"),
        (("--to", "hf", "--base-model", "a b"), "--base-model a b: "),
        (("--to", "hf", "--push-to-hub", "a/b/c"), "wanted a name such as org/model"),
        (("--to", "hf", "--private"), "--private goes with --push-to-hub"),
        (("--to", "hf", "--push-to-hub", "a/b"), "HF_HUB_OFFLINE is set"),
    ],
)
def test_refused(models, tmp_path: Path, flags: tuple[object, ...], says: str) -> None:
    refused("convert", "--load", models("gqa"), "--save", tmp_path / "out", *flags, says=says)
    assert list(tmp_path.iterdir()) == []
