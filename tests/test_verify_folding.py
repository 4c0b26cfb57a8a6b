"""`verify` of a model with gates folded in: what it proves, what it finds; and the record's way
through formats, training and pruning again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.planning.plan import load_plan
from megatron_prune.sources.folding_record import load_folding
from megatron_prune.sources.source import CastSource
from megatron_prune.store import open_source
from megatron_prune.store.passenger import Passenger
from tests.cli.test_prune import write_value
from tests.gates import make_folded
from tests.pico import assert_same, directory_bytes, edit_config, ok, refused, tensors
from tests.sparse import make_sparse

Models, Plans, Shards = Callable[[str], Path], Callable[[str], Path], Callable[..., Path]
Against = Callable[[str], tuple[object, ...]]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"


@pytest.fixture(scope="module")
def made(
    models: Models, plans: Plans, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Kind -> a Hugging Face directory, pruned and folded. Never write into it."""
    root = tmp_path_factory.mktemp("folded")

    def folded(kind: str, axes: str = "DQKFL") -> Path:
        path = root / f"{kind}-{axes}"
        if not path.exists():
            make_folded(models(kind), plans(kind), path, axes=axes)
        return path

    return folded


@pytest.fixture
def against(models: Models, plans: Plans) -> Against:
    return lambda kind: ("--source", models(kind), "--plan", plans(kind))


@pytest.mark.parametrize(
    ("kind", "axes", "says"),
    [
        ("gqa", "DQKFL", "hidden, heads, query_groups, ffn, layers"),
        ("tied", "DL", "hidden, layers"),
        ("mha", "QF", "heads, ffn"),
        ("four", "K", "query_groups"),
        ("mqa", "DQKFL", "hidden, heads, query_groups, ffn, layers"),
        ("all_bias", "DQKFL", "hidden, heads, query_groups, ffn, layers"),
        ("qwen3_tied", "DF", "hidden, ffn"),
        ("bf16", "DQKFL", "hidden, heads, query_groups, ffn, layers"),
    ],
)
def test_a_folded_model_is_proved(
    kind: str, axes: str, says: str, made: Callable[..., Path], against: Against
) -> None:
    out = ok("verify", "--load", made(kind, axes), *against(kind)).out
    assert f"values as planned with the recorded gates of {says}; " in out
    assert "files as in the manifest" in out


def test_heads_that_share_a_group_and_blocks_of_rows_are_proved(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_prune.verify._BLOCK_ROWS", 7)
    plan = tmp_path / "plan.json"
    ok("plan", "--load", models("gqa"), "--save", plan, "--hidden-size-remain", 36)
    make_folded(models("gqa"), plan, tmp_path / "p")
    assert load_plan(plan).target.heads_per_group == 2
    against = ("--source", models("gqa"), "--plan", plan)
    assert "with the recorded gates of" in ok("verify", "--load", tmp_path / "p", *against).out


@pytest.mark.parametrize(
    "flags",
    [
        {"tensor_model_parallel_size": 3},
        {"ckpt_format": "torch", "pipeline_model_parallel_size": 3, "dtype": "bf16"},
    ],
    ids=["torch_dist", "torch"],
)
def test_it_is_written_as_shards_with_the_record_beside_the_plan(
    flags: dict[str, Any], models: Models, plans: Plans, against: Against, tmp_path: Path
) -> None:
    record = make_folded(models("gqa"), plans("gqa"), tmp_path / "m", to="megatron", **flags)
    found = tmp_path / "m/iter_0000001/folding.json"
    assert found.read_text() == record.to_json()
    assert (found.parent / "plan.json").read_bytes() == plans("gqa").read_bytes()
    manifest = json.loads((found.parent / "manifest.json").read_text())
    assert manifest["folding_digest"] == hashlib.sha256(found.read_bytes()).hexdigest()
    assert (
        "with the recorded gates of" in ok("verify", "--load", tmp_path / "m", *against("gqa")).out
    )


def test_it_stays_proved_in_every_format_layout_and_dtype(
    made: Callable[..., Path], against: Against, shards: Shards, plans: Plans, tmp_path: Path
) -> None:
    folded = made("gqa")
    ok("convert", "--load", folded, "--save", tmp_path / "a", "--to", "megatron", TP, 3)
    ok(
        "reshard",
        "--load",
        tmp_path / "a",
        "--save",
        tmp_path / "b",
        "--ckpt-format",
        "torch",
        PP,
        3,
    )
    ok("convert", "--load", tmp_path / "b", "--save", tmp_path / "c", "--to", "hf")
    ok(
        "convert",
        "--load",
        tmp_path / "b",
        "--save",
        tmp_path / "d",
        "--to",
        "hf",
        "--dtype",
        "fp16",
    )
    assert_same(tensors(tmp_path / "c"), tensors(folded))
    record = (folded / "folding.json").read_bytes()
    for place in ("a/iter_0000001", "b/iter_0000001", "c", "d"):
        assert (tmp_path / place / "folding.json").read_bytes() == record
        assert [*(tmp_path / place).rglob("folding.json")] == [tmp_path / place / "folding.json"]
    source = shards("gqa", "torch_dist", 3, 1)
    for folder in "abcd":
        given = ("--source", source, "--plan", plans("gqa"))
        assert "with the recorded gates of" in ok("verify", "--load", tmp_path / folder, *given).out


def test_training_carries_the_record_along(made: Callable[..., Path]) -> None:
    """A checkpoint in training is written from its passenger alone."""
    carried = Passenger.of(CastSource(open_source(made("gqa")), "bf16"))
    assert carried.folding == (made("gqa") / "folding.json").read_bytes()


def test_what_makes_other_weights_leaves_it_behind(
    made: Callable[..., Path], models: Models, plans: Plans, tmp_path: Path
) -> None:
    """As it does with the plan that the gates are of; zeros set in the weights leave both."""
    given = ("--load", made("gqa"), "--ffn-hidden-size-remain", 48, "--to", "hf")
    ok("prune", *given, "--save", tmp_path / "x")
    ok("prune", "--load", models("gqa"), "--plan", plans("gqa"), "--save", tmp_path / "y",
       "--to", "hf")  # fmt: skip
    for folder in (tmp_path / "x", tmp_path / "y"):
        assert (folder / "plan.json").exists() and not (folder / "folding.json").exists()
        assert "folding_digest" not in json.loads((folder / "manifest.json").read_text())
        assert "gates" not in (folder / "README.md").read_text()
    make_sparse(made("gqa"), tmp_path / "z")
    record = (made("gqa") / "folding.json").read_bytes()
    assert (tmp_path / "z/folding.json").read_bytes() == record


def test_the_same_call_gives_the_same_bytes(
    made: Callable[..., Path], models: Models, plans: Plans, tmp_path: Path
) -> None:
    make_folded(models("gqa"), plans("gqa"), tmp_path / "again")
    assert directory_bytes(tmp_path / "again") == directory_bytes(made("gqa"))


def copied(path: Path, copy: Path, *, manifest: bool = False) -> Path:
    ignored = shutil.ignore_patterns(*([] if manifest else ["manifest.json"]))
    return Path(shutil.copytree(path, copy, ignore=ignored))


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("hidden", "model.embed_tokens.weight at (0, 5)"),
        ("layers", "model.layers.1.self_attn.o_proj.weight at (0, 0)"),
        ("heads", "model.layers.1.self_attn.o_proj.weight at (0, 16)"),
        ("query_groups", "model.layers.1.self_attn.o_proj.weight at (0, 16)"),
        ("ffn", "model.layers.1.mlp.down_proj.weight at (0, 2)"),
    ],
)
def test_another_gate_is_found(
    name: str, stored: str, made: Callable[..., Path], against: Against, tmp_path: Path
) -> None:
    folder = copied(made("gqa"), tmp_path / "p")
    gates = json.loads((folder / "folding.json").read_text())["gates"]
    row = gates[name] if name in ("hidden", "layers") else gates[name][1]
    row[{"hidden": 5, "layers": 1}.get(name, 2)] *= 1.001
    edit_config(folder / "folding.json", gates=gates)
    message = refused("verify", "--load", folder, *against("gqa"), says=f"{stored}: is ", code=3)
    assert f"the planned slice of the source times the gates of {folder}/folding.json is" in message


@pytest.mark.parametrize(
    ("name", "place", "says"),
    [
        ("model.layers.2.mlp.down_proj.weight", 61, "down_proj.weight at (1, 1)"),
        ("model.layers.0.post_attention_layernorm.weight", 3, "attention_layernorm.weight at (3,)"),
        ("model.norm.weight", 0, "model.norm.weight at (0,)"),
        ("lm_head.weight", 36, "lm_head.weight at (1, 0)"),
    ],
)
def test_another_value_is_found(
    name: str,
    place: int,
    says: str,
    made: Callable[..., Path],
    against: Against,
    tmp_path: Path,
) -> None:
    folder = copied(made("gqa"), tmp_path / "p")
    value = tensors(folder)[name].flatten()[place].item()
    write_value(folder, name, place, value * (1 + 1e-6))
    refused("verify", "--load", folder, *against("gqa"), says=says, code=3)


def test_values_that_were_not_folded_are_found(
    made: Callable[..., Path], models: Models, plans: Plans, against: Against, tmp_path: Path
) -> None:
    ok("prune", "--load", models("gqa"), "--plan", plans("gqa"), "--save", tmp_path / "p",
       "--to", "hf")  # fmt: skip
    shutil.copy(made("gqa") / "folding.json", tmp_path / "p")
    says = "model.embed_tokens.weight at (0, 0): is "
    refused("verify", "--load", tmp_path / "p", *against("gqa"), says=says, code=3)


@pytest.mark.parametrize("lost", ["folding.json", "plan.json"])
def test_a_record_that_is_gone_is_missed(
    lost: str, made: Callable[..., Path], against: Against, tmp_path: Path
) -> None:
    folder = copied(made("gqa"), tmp_path / "p", manifest=True)
    (folder / lost).unlink()
    says = f"{folder}/{lost}: in the manifest, not on disk; copy it again"
    refused("verify", "--load", folder, *against("gqa"), says=says, code=3)
    (folder / "manifest.json").unlink()
    says = "model.embed_tokens.weight at (0, 0): is "
    message = refused("verify", "--load", folder, *against("gqa"), says=says, code=3)
    assert "the planned slice of the source is" in message


def test_a_damaged_record_is_named(
    made: Callable[..., Path], models: Models, plans: Plans, against: Against, tmp_path: Path
) -> None:
    folder = copied(made("gqa"), tmp_path / "p")
    edit_config(folder / "folding.json", plan_digest="0" * 64)
    says = f"{folder}/folding.json: is of another plan than the one given"
    refused("verify", "--load", folder, *against("gqa"), says=says, code=3)
    refused("inspect", folder, says=says, code=3)
    ok("convert", "--load", folder, "--save", tmp_path / "o", "--to", "hf")  # carried as it is
    assert (tmp_path / "o/folding.json").read_bytes() == (folder / "folding.json").read_bytes()
    assert "gates" not in (tmp_path / "o/README.md").read_text()


def test_inspect_and_the_card_say_so(
    made: Callable[..., Path], models: Models, plans: Plans, tmp_path: Path
) -> None:
    ok("convert", "--load", made("gqa"), "--save", tmp_path / "m", "--to", "megatron", TP, 3)
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "hf", "--to", "hf")
    digest = load_plan(plans("gqa")).source_digest
    for folder in (made("gqa"), tmp_path / "m"):
        facts = json.loads(ok("inspect", folder, "--json").out)
        assert facts["folded_gates"] == "hidden heads query_groups ffn layers"
        assert facts["folded_source_digest"] == digest
    assert "folded_gates" not in json.loads(ok("inspect", models("gqa"), "--json").out)
    for folder in (made("gqa"), tmp_path / "hf"):
        card = (folder / "README.md").read_text()
        assert "# A llama model, pruned, gates folded in\n" in card
        assert "with soft gates on hidden, heads, query_groups, ffn, layers" in card
        assert "`folding.json` has every gate." in card and digest in card


def test_another_programs_file_of_the_name_is_left_out(models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("gqa"), tmp_path / "m")
    (tmp_path / "m/folding.json").write_text('{"paper": "A4"}')
    done = ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "o", "--to", "hf")
    assert "left out, as transformers does: folding.json" in done.err
    assert not (tmp_path / "o/folding.json").exists()


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_record_that_is_a_link_out_is_refused(
    to: str, made: Callable[..., Path], tmp_path: Path
) -> None:
    root = tmp_path / "m"
    ok("convert", "--load", made("gqa"), "--save", root, "--to", to)
    path = next(root.rglob("folding.json"))
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused("inspect", root, says="folding.json is a link out of")


def test_the_record_restores_the_gates_that_were_folded(
    made: Callable[..., Path], models: Models, plans: Plans, tmp_path: Path
) -> None:
    record = make_folded(models("gqa"), plans("gqa"), tmp_path / "p", seed=5)
    plan, config = load_plan(plans("gqa")), open_source(tmp_path / "p").config
    found = load_folding(tmp_path / "p/folding.json", plan, config)
    assert all(x.equal(record.gates.by_axis[axis]) for axis, x in found.gates.by_axis.items())
    assert found.settings == {"mask_method": "hard-concrete", "iteration": 7}
