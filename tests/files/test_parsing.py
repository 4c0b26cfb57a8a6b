"""Whatever a parser throws at somebody's file is an error of ours, and what it takes is bounded."""

from __future__ import annotations

import json
import os
import struct
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_prune.errors import CheckpointError, ConfigError, PlanError, ShapeError, StorageError
from megatron_prune.files import open_to_append
from megatron_prune.files.parsing import (
    JSON_BYTES,
    check_header,
    checked_as,
    parse_json,
    parse_yaml,
    read_json,
    read_table,
    read_yaml,
)
from megatron_prune.model.shape import ModelShape
from megatron_prune.store import open_source
from tests import pico
from tests.pico import refused

LAUGHS = "".join(
    f"{name}: &{name} [{', '.join([f'*{before}' if before else '1'] * 10)}]\n"
    for before, name in zip(("", *"abcdefgh"), "abcdefghi")
)


@pytest.mark.parametrize(
    "text",
    [
        "2026-99-99", "9" * 5000, "[" * 5000, "[" * 70 + "]" * 70, "&a [*a]", LAUGHS, "!!int x",
        "!!int ''", "!!float ' '", "!!bool x", "!!timestamp x", '"\\ud800"', "!!python/name:os.x x",
        "2026-01-01T99:99:99Z", "0x" + "f" * 5000, "a: b: c", "\x00",
    ],
)  # fmt: skip
def test_no_yaml_raises_anything_else(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        parse_yaml(text)
    (tmp_path / "r.yaml").write_text(f"seed: {text}" if "\n" not in text else text)
    refused("plan", "--config", tmp_path / "r.yaml", says="r.yaml: not YAML: ")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "9" * 5000,
        "[" * 100_000,
        "[" * 70 + "]" * 70,
        '"\\ud800"',
        '{"\\udfff": 1}',
        b"\xff",
    ],
)
def test_no_json_raises_anything_else(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)


@given(st.text() | st.binary())
@example("- !!set {? }")
def test_a_parser_raises_only_value_errors(text: str | bytes) -> None:
    for parse in (parse_json, parse_yaml):
        try:
            json.dumps(parse(text), default=str, ensure_ascii=False).encode()
        except (ValueError, TypeError) as error:
            assert isinstance(error, ValueError) or "keys must be" in str(error)


@given(st.recursive(st.none() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=20))
def test_what_json_writes_is_read(value: object) -> None:
    assert repr(parse_json(json.dumps(value, ensure_ascii=True))) == repr(value)


def test_a_pattern_in_yaml_is_a_word_and_no_number_to_the_base_of_60() -> None:
    text = "[2:4, 8:16, 1:30.5, 2:70, 12, -3, 0x10, 0.5, 1_000]"
    assert parse_yaml(text) == ["2:4", "8:16", "1:30.5", "2:70", 12, -3, 16, 0.5, 1000]


def test_whole_pairs_and_the_last_of_two_keys_are_read() -> None:
    assert parse_json('{"a": "\\ud83d\\ude00", "b": 1, "b": 2}') == {"a": "\U0001f600", "b": 2}
    with pytest.raises(ValueError, match="'b' stands twice"):
        parse_json('{"a": 1, "b": 1, "b": 2}', unique=True)


def test_a_plan_that_shows_a_reader_other_indices_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{"version": 1, "kept": {}, "kept": {"ffn": null}}')
    flags = ("--load", tmp_path / "m", "--save", tmp_path / "o", "--to", "hf")
    refused("prune", *flags, "--plan", tmp_path / "p.json", says="'kept' stands twice")


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"), IndexError(), OverflowError("x"), ZeroDivisionError(), RecursionError(),
        NotImplementedError("zip file version 6.4"), struct.error("x"), PlanError("x"),
        FileNotFoundError(2, "No such file"),
    ],
)  # fmt: skip
def test_what_a_readers_values_raise_is_ours(error: Exception) -> None:
    with (
        pytest.raises(ConfigError, match=r"^f\.json: .*; mend it$"),
        checked_as(ConfigError, "f.json", "not one", "; mend it"),
    ):
        raise error


def test_our_own_mistakes_are_not_hidden() -> None:
    with pytest.raises(AssertionError), checked_as(ConfigError, "f", "not one"):
        raise AssertionError


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff\xd8\xff\xe0", "is a picture"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x40\0\0\0\0\0\0\0{}", "is a safetensors file"),
        (b"PK\x03\x04", "is an archive"),
    ],
)
def test_what_is_no_text_is_named(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlanError, match=says):
        read_json(tmp_path / "x", PlanError)


def test_pipes_directories_and_large_files_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="pipe: not JSON: is no file"):
        read_json(tmp_path / "pipe", ConfigError)
    with pytest.raises(ConfigError, match="is no file"):
        read_yaml(tmp_path, ConfigError, flag="--config")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(JSON_BYTES + 1)
    with pytest.raises(ConfigError, match="larger than 128 MiB"):
        read_json(tmp_path / "large", ConfigError)
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(ConfigError, match="list: not JSON: holds a list, wanted an object"):
        read_table(tmp_path / "list", ConfigError)


def test_a_million_names_are_refused_before_they_are_read(tmp_path: Path) -> None:
    model = pico.make_model(tmp_path / "m", "mqa")
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"k{i}": entry for i in range(30_000)}).encode()
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    began = time.process_time()
    refused("inspect", model, says="a header of", code=3)
    assert time.process_time() - began < 1
    with pytest.raises(ValueError, match=f"a header of {2**60} bytes"):
        (model / "x").write_bytes(struct.pack("<Q", 2**60))
        check_header(model / "x", 1 << 20)
    index = {"weight_map": {f"k{i}": f"f{i}.safetensors" for i in range(30_000)}}
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused("inspect", model, says="names 30000 files", code=3)


@pytest.mark.parametrize(
    ("name", "size"),
    [("num_layers", 10_001), ("vocab_size", 2**27 + 1), ("hidden_size", 10**4000)],
)
def test_sizes_that_no_model_has_are_refused(name: str, size: int) -> None:
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    names += ("num_query_groups", "kv_channels", "vocab_size")
    with pytest.raises(ShapeError, match=f"{name} is more than"):
        ModelShape(**{**dict.fromkeys(names, 1), name: size})


def test_ten_million_layers_are_refused_at_once(tmp_path: Path) -> None:
    model = pico.make_model(tmp_path / "m", "mqa")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**7}))
    with pytest.raises(CheckpointError, match="num_layers is more than 10000"):
        open_source(model)


def test_lines_are_added_to_files_only(tmp_path: Path) -> None:
    for line in ("a\n", "b\n"):
        with open_to_append(tmp_path / "rows") as file:
            file.write(line)
    assert (tmp_path / "rows").read_text() == "a\nb\n"
    (tmp_path / "link").symlink_to(tmp_path / "rows")
    os.mkfifo(tmp_path / "pipe")
    for name, says in (("link", "is a link, and not followed"), ("pipe", "")):
        with pytest.raises(StorageError, match=says):
            open_to_append(tmp_path / name)
    assert (tmp_path / "rows").read_text() == "a\nb\n"
