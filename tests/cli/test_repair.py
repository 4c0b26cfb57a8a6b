"""`prune --repair --norm-rescale`: the record travels, `verify` holds to it, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.test_prune import write_value
from tests.pico import TEXT, assert_same, directory_bytes, make_model, ok, refused, tensors

Models, Plans = Callable[[str], Path], Callable[[str], Path]
TP = "--tensor-model-parallel-size"
OWN = ("--repair-target", "own", "--no-repair-readers")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.fixture(scope="module")
def given(models: Models, plans: Plans, text: Path) -> tuple[object, ...]:
    """Everything but ``--save`` and the target."""
    data = ("--data", text, "--num-samples", 4, "--seq-length", 32)
    what = ("--repair", "--norm-rescale", *OWN, *data)
    return ("prune", "--load", models("gqa"), "--plan", plans("gqa"), *what)


@pytest.fixture(scope="module")
def repaired(given: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("repaired") / "hf"
    done = ok(*given, "--save", out, "--to", "hf")
    assert "rescaled 7 norms by " in done.out
    assert "refitted 6 projections: relative error of their outputs " in done.out
    assert sorted(path.name for path in out.parent.iterdir()) == ["hf"]  # no scratch left
    return out


def test_only_projections_and_norms_differ_from_the_plain_slice(
    models: Models, plans: Plans, repaired: Path, tmp_path: Path
) -> None:
    given = ("--load", models("gqa"), "--plan", plans("gqa"), "--save", tmp_path / "a")
    ok("prune", *given, "--to", "hf")
    plain, found = tensors(tmp_path / "a"), tensors(repaired)
    assert set(found) == set(plain)
    differ = {name for name in plain if not torch.equal(plain[name], found[name])}
    assert differ == {n for n in plain if "norm" in n or "o_proj" in n or "down_proj" in n}
    assert not (tmp_path / "a/repair.json").exists()
    assert "repair_digest" not in json.loads((tmp_path / "a/manifest.json").read_text())


def test_the_record_names_every_tensor_and_what_it_was_made_from(
    plans: Plans, repaired: Path, text: Path
) -> None:
    record = json.loads((repaired / "repair.json").read_text())
    plan = hashlib.sha256(plans("gqa").read_bytes()).hexdigest()
    assert record["plan_digest"] == plan
    assert record["settings"]["tokens"] == 4 * 32
    assert len(record["tensors"]) == 7 + 6
    norm = record["tensors"]["decoder.final_layernorm.weight"]
    sha = hashlib.sha256(tensors(repaired)["model.norm.weight"].numpy().tobytes()).hexdigest()
    assert norm["sha256"]["fp32"] == sha
    manifest = json.loads((repaired / "manifest.json").read_text())
    digest = hashlib.sha256((repaired / "repair.json").read_bytes()).hexdigest()
    assert (manifest["plan_digest"], manifest["repair_digest"]) == (plan, digest)


def test_the_record_travels_and_verify_accepts_every_form(
    models: Models, plans: Plans, repaired: Path, tmp_path: Path
) -> None:
    ok("convert", "--load", repaired, "--save", tmp_path / "a", "--to", "megatron", TP, 3)
    to = ("--ckpt-format", "torch", "--pipeline-model-parallel-size", 3)
    ok("reshard", "--load", tmp_path / "a", "--save", tmp_path / "b", *to)
    cast = ("--to", "hf", "--dtype", "bf16")
    ok("convert", "--load", tmp_path / "b", "--save", tmp_path / "c", *cast)
    record = (repaired / "repair.json").read_bytes()
    for place in ("a/iter_0000001", "b/iter_0000001", "c"):
        assert (tmp_path / place / "repair.json").read_bytes() == record
    against = ("--source", models("gqa"), "--plan", plans("gqa"))
    for folder in (repaired, *(tmp_path / name for name in "abc")):
        said = ok("verify", "--load", folder, *against).out
        assert "30 tensors (13 repaired as recorded)" in said
        assert "files as in the manifest" in said


def test_training_carries_the_record_along(repaired: Path) -> None:
    """A checkpoint in training is written from its passenger alone."""
    from megatron_prune.sources.source import CastSource
    from megatron_prune.store import open_source
    from megatron_prune.store.passenger import Passenger

    carried = Passenger.of(CastSource(open_source(repaired), "bf16"))
    assert carried.repair == (repaired / "repair.json").read_bytes()


def test_pruning_a_repaired_model_again_leaves_its_record_behind(
    repaired: Path, tmp_path: Path
) -> None:
    given = ("--load", repaired, "--ffn-hidden-size-remain", 48, "--to", "hf")
    ok("prune", *given, "--save", tmp_path / "x")
    assert not (tmp_path / "x/repair.json").exists()


def test_the_source_may_be_shards_and_the_target_too(
    given: tuple[object, ...], shards: Callable[..., Path], repaired: Path, tmp_path: Path
) -> None:
    words = [shards("gqa", "torch_dist", 3, 1) if x == given[2] else x for x in given]
    ok(*words, "--save", tmp_path / "a", "--to", "megatron", TP, 3)
    ok("convert", "--load", tmp_path / "a", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), tensors(repaired))


def test_the_same_command_gives_the_same_bytes(
    given: tuple[object, ...], repaired: Path, tmp_path: Path
) -> None:
    ok(*given, "--save", tmp_path / "again", "--to", "hf")
    assert directory_bytes(tmp_path / "again") == directory_bytes(repaired)


def test_a_low_precision_model_keeps_its_dtype(models: Models, text: Path, tmp_path: Path) -> None:
    given = ("--load", models("bf16"), "--data", text, "--num-samples", 4, "--seq-length", 32)
    flags = ("--ffn-hidden-size-remain", 60, "--hidden-size-remain", 36, "--bf16")
    ok(
        "prune",
        *given,
        *flags,
        *("--repair", *OWN),
        "--norm-rescale",
        "--save",
        tmp_path / "x",
        "--to",
        "hf",
    )
    assert {x.dtype for x in tensors(tmp_path / "x").values()} == {torch.bfloat16}
    record = json.loads((tmp_path / "x/repair.json").read_text())["tensors"]
    fitted = [t for t in record.values() if t["how"] == "least-squares"]
    assert all(t["error_after"] < t["error_before"] for t in fitted) and len(fitted) == 4
    against = ("--source", models("bf16"), "--plan", tmp_path / "x/plan.json")
    assert "repaired" in ok("verify", "--load", tmp_path / "x", *against).out


def test_norm_energies_may_come_from_scores(
    models: Models, plans: Plans, text: Path, repaired: Path, tmp_path: Path
) -> None:
    """By hand: ones give the ratio 1, a channel with all the energy its share."""
    from megatron_prune.planning.plan import load_plan
    from megatron_prune.planning.scores import Scores, scores_bytes

    plan = load_plan(plans("gqa"))
    energy = torch.ones(9, 48)
    kept, dropped = plan.indices("D"), sorted(set(range(48)) - set(plan.indices("D")))
    energy[2 * 2] = 0  # input norm of the source's layer 2, the target's 1
    energy[4, kept[0]], energy[4, dropped[0]] = 9.0, 39.0
    digest = plan.source_digest
    given = ("--plan", plans("gqa"), "--norm-rescale", "--scores", tmp_path / "s", "--to", "hf")
    for name, who in (("s", digest), ("other", "f" * 64)):
        scores = Scores(
            shape=plan.source, source_digest=who, criteria={}, statistics={"norm_energy": energy}
        )
        (tmp_path / name).write_bytes(scores_bytes(scores))
    ok("prune", "--load", models("gqa"), *given, "--save", tmp_path / "x")
    ok("prune", "--load", models("gqa"), *given[:2], "--to", "hf", "--save", tmp_path / "plain")
    found, plain = tensors(tmp_path / "x"), tensors(tmp_path / "plain")
    for name, x in plain.items():
        ratio = 0.5 if name == "model.layers.1.input_layernorm.weight" else 1.0
        torch.testing.assert_close(found[name], x * ratio)
    settings = json.loads((tmp_path / "x/repair.json").read_text())["settings"]
    assert (settings["norm_energy_from"], settings["tokens"]) == ("scores", 0)
    words = [tmp_path / "other" if x == tmp_path / "s" else x for x in given]
    refused(
        "prune", "--load", models("gqa"), *words, "--save", tmp_path / "y", says="another model"
    )


# ---- what verify refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["self_attn.o_proj", "input_layernorm", "mlp.up_proj"])
@pytest.mark.parametrize("manifest", [True, False])
def test_verify_refuses_a_changed_value(
    part: str, manifest: bool, models: Models, plans: Plans, repaired: Path, tmp_path: Path
) -> None:
    ignored = shutil.ignore_patterns(*(() if manifest else ("manifest.json",)))
    shutil.copytree(repaired, tmp_path / "p", ignore=ignored)
    name = f"model.layers.1.{part}.weight"
    write_value(tmp_path / "p", name, 5, 7.0)
    against = ("--source", models("gqa"), "--plan", plans("gqa"))
    message = refused("verify", "--load", tmp_path / "p", *against, says=name, code=3)
    assert "its SHA-256 is not the one" in message or "up_proj" in message


def _edit(record: dict, edit: str) -> dict:
    if edit == "plan":
        return {**record, "plan_digest": "0" * 64}
    if edit == "claim":
        name = "decoder.layers.0.self_attention.linear_q.bias"
        return {**record, "tensors": {**record["tensors"], name: {"how": "x", "sha256": {}}}}
    if edit == "version":
        return {**record, "version": 2}
    claims = {"layer": "decoder.layers.9.input_layernorm.weight", "word": "decoder.layers.x.y"}
    if edit in claims:
        fields = {"how": "norm-rescale", "sha256": {}}
        return {**record, "tensors": {**record["tensors"], claims[edit]: fields}}
    fields = {
        "digests": {"how": "x", "sha256": "abc"},
        "digest": {"how": "x", "sha256": {"fp32": 3}},
        "how": {"how": 7, "sha256": {}},
        "ratio": {"how": "x", "sha256": {}, "ratio": "1"},
    }
    if edit in fields:
        return {**record, "tensors": {"decoder.final_layernorm.weight": fields[edit]}}
    return {**record, "tensors": {}}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ("plan", "is of another plan than the one given"),
        ("claim", "claims decoder.layers.0.self_attention.linear_q.bias, which no repair replaces"),
        ("layer", "claims decoder.layers.9.input_layernorm.weight, which no repair replaces"),
        ("word", "claims decoder.layers.x.y, which no repair replaces"),
        ("digests", "not the record of a repair: sha256 is 'abc'; wanted a table"),
        ("digest", "not the record of a repair: sha256 is {'fp32': 3}; wanted a table"),
        ("how", "not the record of a repair: how is 7; wanted a word"),
        ("ratio", "not the record of a repair: ratio is '1'; wanted a number"),
        ("version", "version 2; this reads 1"),
        ("empty", "the planned slice of the source is"),
        ("text", "not the record of a repair"),
        ("gone", "the planned slice of the source is"),
    ],
)
def test_verify_refuses_a_changed_record(
    edit: str, says: str, models: Models, plans: Plans, repaired: Path, tmp_path: Path
) -> None:
    shutil.copytree(repaired, tmp_path / "p", ignore=shutil.ignore_patterns("manifest.json"))
    file = tmp_path / "p/repair.json"
    if edit == "gone":
        file.unlink()
    elif edit == "text":
        file.write_text("{")
    else:
        file.write_text(json.dumps(_edit(json.loads(file.read_text()), edit)))
    against = ("--source", models("gqa"), "--plan", plans("gqa"))
    refused("verify", "--load", tmp_path / "p", *against, says=says, code=3)


# ---- what prune refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--repair",), "--repair without --data: it needs text to calibrate on"),
        (("--norm-rescale",), "--norm-rescale without --data or --scores"),
        (("--data", "TEXT"), "--data without --repair or --norm-rescale"),
        (("--num-samples", 3), "--num-samples without --repair or --norm-rescale: nothing would"),
        (("--repair-target", "dense"), "--repair-target without --repair or --norm-rescale"),
        (("--repair", "--data", "none.txt"), "none.txt: is not there"),
        (("--repair", "--data", "TEXT", "--seq-length", 4000), "more than the model's max_pos"),
        (("--repair", "--data", "SHORT"), "one window takes 128; give more text or a smaller"),
        (("--repair", "--data", "TEXT", "--repair-damping", -1), "-1.0: wanted 0 or more"),
        (("--repair", "--data", "TEXT", "--repair-damping", "nan"), "nan: wanted 0 or more"),
        (
            ("--repair", "--data", "TEXT", "--repair-tensor-parallel-size", 2),
            "tensor-model-parallel-size 2 does not divide num_query_groups 3",
        ),
        (
            ("--repair", "--data", "TEXT", "--repair-tensor-parallel-size", 3),
            "1 processes do not make whole models of tensor-model-parallel-size 3",
        ),
        (
            (*("--repair", "--data", "TEXT", "--repair-statistics", "dense"),
             *("--repair-target", "stream")),
            "--repair-target stream needs sequential",
        ),
    ],
)  # fmt: skip
def test_flags_that_do_not_fit_are_refused(
    flags: tuple, says: str, models: Models, plans: Plans, text: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("few words")
    words = [{"TEXT": text, "SHORT": short}.get(str(word), word) for word in flags]
    given = ("--load", models("gqa"), "--plan", plans("gqa"), "--save", tmp_path / "x")
    refused("prune", *given, "--to", "hf", *words, says=says)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_a_tokenizer_of_another_model_is_refused(
    models: Models, text: Path, tmp_path: Path
) -> None:
    given = ("--load", models("mqa"), "--hidden-size-remain", 31, "--save", tmp_path / "x")
    says = "the model has a vocabulary of 96; name its own with --tokenizer-model"
    refused("prune", *given, "--to", "hf", "--norm-rescale", "--data", text, says=says)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_leaves_nothing_to_repair_is_refused(
    models: Models, text: Path, tmp_path: Path
) -> None:
    given = ("--load", models("gqa"), "--drop-layers", 1, "--save", tmp_path / "x", "--to", "hf")
    for flags in (("--repair", *OWN), ("--norm-rescale",), ("--repair", *OWN, "--norm-rescale")):
        refused("prune", *given, *flags, "--data", text, says="nothing to repair: --repair is for")


def test_what_has_nothing_to_do_beside_what_has_is_only_said(
    models: Models, text: Path, tmp_path: Path
) -> None:
    given = ("--load", models("gqa"), "--ffn-hidden-size-remain", 60, "--to", "hf")
    data = ("--data", text, "--num-samples", 2, "--seq-length", 32)
    both = ("--repair", "--norm-rescale")
    said = ok("prune", *given, *both, *data, "--save", tmp_path / "x").err
    assert "--norm-rescale: the plan keeps all hidden channels; nothing to rescale" in said


def test_biases_are_not_counted_as_projections(
    models: Models, plans: Plans, text: Path, tmp_path: Path
) -> None:
    given = ("--load", models("all_bias"), "--plan", plans("all_bias"), "--save", tmp_path / "x")
    data = ("--repair", *OWN, "--data", text, "--num-samples", 2, "--seq-length", 32)
    done = ok("prune", *given, "--to", "hf", *data)
    assert "refitted 6 projections: " in done.out  # of 3 layers, each with a bias
    assert len(json.loads((tmp_path / "x/repair.json").read_text())["tensors"]) == 12


def test_a_fit_that_the_stored_dtype_cannot_hold_is_refused_with_the_tensors_name(
    text: Path, tmp_path: Path
) -> None:
    """Channels in pairs that do the same: one that stays alone has to do what two did."""
    model = make_model(tmp_path / "m", "fp16")
    weights = load_file(model / "model.safetensors")
    prefix = "model.layers.3.mlp."
    for name in ("gate_proj", "up_proj"):
        weights[f"{prefix}{name}.weight"][1::2] = weights[f"{prefix}{name}.weight"][::2]
    weights[f"{prefix}down_proj.weight"].fill_(40_000)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    given = ("--load", model, "--ffn-hidden-size-remain", 60, "--save", tmp_path / "x")
    data = ("--repair", "--data", text, "--num-samples", 4, "--seq-length", 32)
    says = "the repaired decoder.layers.3.mlp.linear_fc2.weight (layers as in the pruned model) is"
    refused("prune", *given, "--to", "hf", *data, says=says, code=3)
    assert not (tmp_path / "x").exists()


def test_a_dry_run_repairs_nothing(given: tuple[object, ...], tmp_path: Path) -> None:
    done = ok(*given, "--save", tmp_path / "x", "--to", "hf", "--dry-run")
    assert "would write" in done.out and "refitted" not in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "flags", "says"),
    [
        ("mlp.up_proj", ("--repair", *OWN), "decoder.layers.1.mlp.linear_fc2"),
        ("self_attn.v_proj", ("--repair", *OWN), "decoder.layers.1.self_attention.linear_proj"),
        ("mlp.up_proj", ("--repair",), "decoder.layers.1.mlp.linear_up.weight, fitted, is not"),
        ("mlp.up_proj", ("--norm-rescale",), "model.layers.2.input_layernorm.weight is not finite"),
    ],
)
def test_statistics_that_are_not_finite_name_the_tensor(
    part: str, flags: tuple, says: str, text: Path, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m", "gqa")
    weights = load_file(model / "model.safetensors")
    weights[f"model.layers.1.{part}.weight"][70 if "up" in part else 3, 4] = float("inf")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    given = ("--load", model, "--save", tmp_path / "x", "--to", "hf", *flags)
    data = ("--data", text, "--num-samples", 2, "--seq-length", 32)
    plan = tmp_path / "p.json"
    plan_flags = ("--num-attention-heads-remain", 3, "--ffn-hidden-size-remain", 95)
    plan_flags += ("--hidden-size-remain", 47, "--allow-nonfinite")
    ok("plan", "--load", model, "--save", plan, *plan_flags)
    kept = json.loads(plan.read_text())["kept"]
    assert 70 in kept["ffn"]["1"] and 4 in kept["hidden"], "choose another value"
    refused("prune", *given, *data, "--plan", plan, says=says, code=3)
    assert not (tmp_path / "x").exists()
