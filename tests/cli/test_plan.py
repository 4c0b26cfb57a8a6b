"""`plan`: the file it writes, the predecessor's JSON, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pico import ok, refused

Models, Shards = Callable[[str], Path], Callable[..., Path]
PRUNE = (
    *("--hidden-size-remain", 36, "--num-attention-heads-remain", 3),
    *("--ffn-hidden-size-remain", 60, "--drop-layers", "1"),
)


def test_the_plan_is_the_same_from_every_format_layout_and_number_of_files(
    models: Models, shards: Shards, tmp_path: Path
) -> None:
    """Law 3, and a plan made from the Hugging Face directory prunes the shards."""
    ok("convert", "--load", models("gqa"), "--save", tmp_path / "s", "--to", "hf", "--max-shard-size", "40KB")  # fmt: skip # noqa: E501
    sources = (
        models("gqa"), tmp_path / "s", shards("gqa", "torch_dist", 3, 1),
        shards("gqa", "torch", 3, 2), shards("gqa", "torch", 1, 4),
    )  # fmt: skip
    for number, source in enumerate(sources):
        save = ("--save", tmp_path / f"{number}.json")
        ok("plan", "--load", source, *save, *PRUNE, "--balance-for", 3)
    written = {(tmp_path / f"{number}.json").read_bytes() for number in range(len(sources))}
    assert len(written) == 1


def test_balance_for_defaults_to_the_sources_tensor_parallel_size(
    models: Models, shards: Shards, tmp_path: Path
) -> None:
    for name, source in (("1", models("gqa")), ("3", shards("gqa", "torch_dist", 3, 1))):
        ok("plan", "--load", source, "--save", tmp_path / name, *PRUNE)
        assert json.loads((tmp_path / name).read_text())["balance_for"] == int(name)


def test_it_prints_both_shapes_parameters_and_bytes(models: Models, tmp_path: Path) -> None:
    out = ok("plan", "--load", models("gqa"), "--save", tmp_path / "p", *PRUNE).out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert table["hidden_size"] == ["48", "36"] and table["num_layers"] == ["4", "3"]
    assert {"parameters", "bytes"} <= set(table)


def test_nothing_asked_for_is_a_plan_of_nulls(models: Models, tmp_path: Path) -> None:
    ok("plan", "--load", models("gqa"), "--save", tmp_path / "p")
    assert set(json.loads((tmp_path / "p").read_text())["kept"].values()) == {None}


@pytest.mark.parametrize("drop_layers", ["1", [1], "1-1"])
def test_the_predecessors_json_is_taken(drop_layers: Any, models: Models, tmp_path: Path) -> None:
    """prune_hf/prune_llama.py's keys."""
    values = {
        "hidden_size_remain": 36, "num_attention_heads_remain": 3,
        "ffn_hidden_size_remain": 60, "drop_layers": drop_layers,
    }  # fmt: skip
    (tmp_path / "old.json").write_text(json.dumps(values))
    load = ("--load", models("gqa"))
    ok("plan", *load, "--save", tmp_path / "a", "--prune_config_path", tmp_path / "old.json")
    ok("plan", *load, "--save", tmp_path / "b", *PRUNE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flag_wins_over_the_predecessors_json(models: Models, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"hidden_size_remain": 36, "drop_layers": []}')
    given = ("--prune-config-path", tmp_path / "old.json", "--hidden-size-remain", 24)
    ok("plan", "--load", models("gqa"), "--save", tmp_path / "a", *given)
    assert json.loads((tmp_path / "a").read_text())["target"]["hidden_size"] == 24


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file"),
        ("{", "old.json"),
        ("[]", "unknown []"),
        ('{"hidden": 3}', "unknown ['hidden']; wanted drop_layers, ffn_hidden_size_remain"),
        ('{"hidden_size_remain": "36"}', "hidden_size_remain is '36'; wanted an integer"),
        ('{"hidden_size_remain": true}', "hidden_size_remain is True; wanted an integer"),
        ('{"drop_layers": ["one"]}', "'one' is not a layer"),
        ('{"drop_layers": 1.5}', "'1.5' is not a layer"),
        ("[" * 100_000, "old.json"),
    ],
)
def test_a_predecessors_json_that_is_none_is_refused(
    content: str | None, says: str, models: Models, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "old.json").write_text(content)
    given = ("--prune-config-path", tmp_path / "old.json")
    refused("plan", "--load", models("gqa"), "--save", tmp_path / "p", *given, says=says)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--hidden-size-remain", 999), "--hidden-size-remain 999: the model has 48"),
        (("--hidden-size-remain", 0), "--hidden-size-remain 0: the model has 48; wanted 1 to 48"),
        (("--num-attention-heads-remain", 4), "over 3 query groups of up to 2 heads"),
        (("--ffn-hidden-size-remain", 50, "--balance-for", 3), "50 over 3 tensor-parallel ranks"),
        (("--drop-layers", "9"), "9 is not a layer; the model has 0 to 3"),
        (("--drop-layers", "1,1"), "1 stands twice"),
        (("--drop-layers", "0-3"), "drops all 4 layers"),
        (("--drop-layers", "one"), "'one' is not a layer; wanted numbers and ranges"),
        (("--drop-layers", ""), "'' is not a layer"),
        (("--drop-layers=-1",), "'-1' is not a layer"),
        (("--balance-for", 0), "--balance-for 0: wanted 1 or more"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_leaves_nothing(
    flags: tuple, says: str, models: Models, tmp_path: Path
) -> None:
    refused("plan", "--load", models("gqa"), "--save", tmp_path / "p", *flags, says=says)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_plan_is_kept_without_overwrite(models: Models, tmp_path: Path) -> None:
    save = ("--load", models("gqa"), "--save", tmp_path / "p.json")
    ok("plan", *save, "--seed", 1)
    before = (tmp_path / "p.json").read_bytes()
    refused("plan", *save, "--seed", 2, *PRUNE, says="exists; remove it or use --overwrite")
    assert (tmp_path / "p.json").read_bytes() == before
    ok("plan", *save, "--seed", 2, *PRUNE, "--overwrite")
    assert json.loads((tmp_path / "p.json").read_text())["seed"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_plan_that_cannot_be_written_exits_4(models: Models, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "none/p.json", tmp_path / "file/p.json"):
        refused("plan", "--load", models("gqa"), "--save", place, code=4, says=str(place))


@pytest.mark.parametrize(
    ("kind", "hidden", "engines"),
    [
        ("gqa", 48, None), ("gqa", 36, "TGI take"), ("qwen", 36, "TGI, mlx-lm, vLLM and SGLang"),
        ("mistral", 36, None), ("qwen3", 36, None),
    ],
)  # fmt: skip
def test_engines_that_derive_head_dim_are_named_for_every_family(
    kind: str, hidden: int, engines: str | None, models: Models, tmp_path: Path
) -> None:
    remain = ("--hidden-size-remain", hidden)
    done = ok("plan", "--load", models(kind), "--save", tmp_path / "p.json", *remain)
    assert ("for head_dim in family" in done.err) == (engines is not None)
    assert (engines or "") in done.err
    pruned = ok("prune", "--load", models(kind), "--save", tmp_path / "p", "--to", "hf", *remain)
    assert ("for head_dim in family" in pruned.err) == (engines is not None)


def test_both_rules_of_head_dim_are_told_of_layers_of_different_widths(
    models: Models, tmp_path: Path
) -> None:
    """transformers loads such a model by LlamaConfig, whose rule holds there too."""
    done = ok(
        "plan", "--load", models("gqa"), "--save", tmp_path / "p.json", "--nonuniform",
        "--ffn-hidden-size-remain", 60, "--hidden-size-remain", 40,
    )  # fmt: skip
    assert "is not a multiple of 6 heads" in done.err
    assert "llama.cpp, mlx-lm take hidden_size / heads" in done.err
