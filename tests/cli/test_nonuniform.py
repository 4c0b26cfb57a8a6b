"""`--nonuniform`, end to end: planned, cut, verified, repaired, evaluated, run by transformers.

transformers runs the pruned models by the code written beside them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.planning.scores import Scores, score_shape, scores_bytes
from megatron_prune.store import open_source
from tests.cli.test_prune import write_value
from tests.engine.on_ranks import Job, launch
from tests.pico import (
    IDS,
    TEXT,
    assert_same,
    directory_bytes,
    make_model,
    ok,
    refused,
    slice_by_plan,
    tensors,
)
from tests.test_law_zeroing import zero_dropped

Models = Callable[[str], Path]
FFN = ("--ffn-hidden-size-remain", 48, "--nonuniform", "--nonuniform-scores", "raw")


def scores(model: Path, path: Path) -> tuple[object, ...]:
    """The flags of a scores file whose layers differ: the later ones have the better channels."""
    with closing(open_source(model)) as source:
        shape, digest = source.config.shape, source.digest
    random = torch.Generator().manual_seed(5)
    found = {a: torch.rand(score_shape(a, shape), generator=random) for a in "DQKFL"}
    found["F"] *= torch.linspace(1, 4, shape.num_layers)[:, None]
    path.write_bytes(
        scores_bytes(Scores(shape=shape, source_digest=digest, criteria={"made": found}))
    )
    return "--scores", path, "--criterion", "made"


EVERYTHING = (
    *("--hidden-size-remain", 37, "--num-attention-heads-remain", 3, "--drop-layers", 1),
    *("--nonuniform-multiple", 4, "--balance-for", 3),
)


def widths_of(plan: Path) -> list[int]:
    return json.loads(plan.read_text())["target"]["ffn_per_layer"]


@pytest.fixture
def by_transformers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """A directory -> its model, by transformers alone and the code beside it."""
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")

    def load(path: Path, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=True)

    return load


@pytest.fixture(scope="module")
def pruned(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plan.json``, ``hf`` pruned by it, and ``text``."""
    folder = tmp_path_factory.mktemp("nonuniform")
    load, plan = ("--load", models("gqa")), folder / "plan.json"
    by = scores(models("gqa"), folder / "scores.safetensors")
    done = ok("plan", *load, "--save", plan, *FFN, *EVERYTHING, *by)
    widths = widths_of(plan)
    assert len(set(widths)) > 1 and sum(widths) == 3 * 48 and all(n % 12 == 0 for n in widths)
    assert f"ffn_per_layer         {' '.join(map(str, widths))}" in done.out
    assert "no other engine does, unless with --nonuniform-multiple 256" in done.err
    ok("prune", *load, "--plan", plan, "--save", folder / "hf", "--to", "hf")
    (folder / "text").write_text(TEXT * 40)
    return folder


def test_the_tensors_are_the_planned_slices_and_their_number_is_what_plan_counts(
    models: Models, pruned: Path
) -> None:
    found = tensors(pruned / "hf")
    assert_same(found, slice_by_plan(tensors(models("gqa")), pruned / "plan.json"))
    manifest = json.loads((pruned / "hf/manifest.json").read_text())
    assert manifest["parameters"] == sum(x.numel() for x in found.values())
    assert manifest["shape"]["ffn_per_layer"] == widths_of(pruned / "plan.json")


def test_prune_makes_the_plan_on_the_way_and_ranks_do_not_matter(
    models: Models, pruned: Path, tmp_path: Path
) -> None:
    words = ["prune", "--load", models("gqa"), "--save", tmp_path / "a", "--to", "hf", *FFN]
    words += [*EVERYTHING, "--scores", pruned / "scores.safetensors", "--criterion", "made"]
    words += ["--max-shard-size", "40KB"]
    job = Job(check="command", world=2, given={"words": [str(word) for word in words]})
    assert launch([job], tmp_path / "ranks", ranks=2) == [[0, 0]]
    assert (tmp_path / "a/plan.json").read_bytes() == (pruned / "plan.json").read_bytes()
    assert_same(tensors(tmp_path / "a"), tensors(pruned / "hf"))


@pytest.mark.parametrize("kind", ["gqa", "all_bias", "tied", "llama3"])
def test_slicing_equals_zeroing_by_transformers(
    kind: str, models: Models, by_transformers: Callable[..., Any], tmp_path: Path
) -> None:
    """Law 4 with layers of different widths, in float64, with a control that must differ."""
    plan, out = tmp_path / "p.json", tmp_path / "out"
    by = scores(models(kind), tmp_path / "s")
    ok("plan", "--load", models(kind), "--save", plan, *FFN, "--num-attention-heads-remain", 3, *by)
    ok("prune", "--load", models(kind), "--plan", plan, "--save", out, "--to", "hf")
    assert len(set(widths_of(plan))) > 1
    source, found = (by_transformers(path, torch.float64) for path in (models(kind), out))
    assert [layer.mlp.up_proj.out_features for layer in found.model.layers] == widths_of(plan)
    with torch.no_grad():
        control = source(IDS).logits
        zero_dropped(source, json.loads(plan.read_text()))
        zeroed, sliced = source(IDS).logits, found(IDS).logits
    assert (sliced - zeroed).abs().max() < 1e-10
    assert (sliced - control).abs().max() > 1e-3, "nothing was pruned: this test cannot fail"


def test_the_code_beside_it_reads_ffn_mult_and_gives_attributes(
    by_transformers: Callable[..., Any], tmp_path: Path
) -> None:
    """As vLLM asks: ``hasattr(block.ffn, "ffn_mult")``; and the other engines' form is written."""
    model = make_model(tmp_path / "m", "gqa", intermediate_size=768)
    plan = ("--ffn-hidden-size-remain", 512, "--nonuniform", "--nonuniform-multiple", 256)
    given = ("--load", model, *plan, "--nonuniform-scores", "raw", *scores(model, tmp_path / "s"))
    done = ok("prune", *given, "--save", tmp_path / "a", "--to", "hf")
    assert "SGLang, TensorRT-LLM, llama.cpp and mlx-lm read it too" in done.err
    widths = widths_of(tmp_path / "a/plan.json")
    assert len(set(widths)) > 1
    found = by_transformers(tmp_path / "a", torch.float32)
    assert [layer.mlp.up_proj.out_features for layer in found.model.layers] == widths
    block = found.config.block_configs[0]
    assert hasattr(block.ffn, "ffn_mult") and not hasattr(block.ffn, "intermediate_size")
    assert (block.attention.n_heads_in_group, block.attention.no_op) == (2, False)
    found.save_pretrained(tmp_path / "b")
    ok("inspect", tmp_path / "b")


def test_verify_confirms_it_and_finds_one_changed_value(
    models: Models, pruned: Path, tmp_path: Path
) -> None:
    given = ("--source", models("gqa"), "--plan", pruned / "plan.json")
    ok("verify", "--load", pruned / "hf", *given)
    shutil.copytree(pruned / "hf", tmp_path / "a")
    name = "model.layers.2.mlp.down_proj.weight"
    write_value(tmp_path / "a", name, 1, 7.0)
    refused("verify", "--load", tmp_path / "a", *given, says=f"{name} at (0, 1): is 7.0", code=3)


def test_another_width_than_the_configurations_is_refused(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned / "hf", tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    config["block_configs"].reverse()
    (tmp_path / "a/config.json").write_text(json.dumps(config))
    refused("inspect", tmp_path / "a", says="config.json says (", code=3)


def test_convert_copies_it_from_hugging_face_to_hugging_face(pruned: Path, tmp_path: Path) -> None:
    ok("convert", "--load", pruned / "hf", "--save", tmp_path / "a", "--to", "hf")
    assert directory_bytes(tmp_path / "a") == directory_bytes(pruned / "hf")


def test_a_repair_is_recorded_verified_and_helps(
    models: Models, pruned: Path, tmp_path: Path
) -> None:
    data = ("--data", pruned / "text", "--num-samples", 8, "--seq-length", 32)
    given = ("--load", models("gqa"), "--plan", pruned / "plan.json", "--to", "hf")
    ok("prune", *given, "--save", tmp_path / "a", "--repair", "--norm-rescale", *data)
    ok(
        "verify",
        "--load",
        tmp_path / "a",
        "--source",
        models("gqa"),
        "--plan",
        pruned / "plan.json",
    )
    record = json.loads((tmp_path / "a/repair.json").read_text())["tensors"]
    fitted = [x for name, x in record.items() if "linear_fc2" in name]
    assert len(fitted) == 3
    assert all(x["error_after"] < x["error_before"] for x in fitted)


LAYOUTS: dict[str, tuple[int, tuple[object, ...]]] = {
    "alone": (1, ()),
    "tp3": (3, ("--tensor-model-parallel-size", 3)),
    "pp3": (3, ("--pipeline-model-parallel-size", 3)),
}


def test_evaluate_says_what_transformers_says_at_every_layout(
    pruned: Path, by_transformers: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    model = by_transformers(pruned / "hf", torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(pruned / "hf", config=model.config)
    ids = tokenizer((pruned / "text").read_text(), add_special_tokens=False).input_ids
    windows = torch.tensor(ids[: 4 * 48]).view(4, 48)
    with torch.no_grad():
        wanted = float(model(windows, labels=windows).loss)
    jobs = []
    for name, (ranks, flags) in LAYOUTS.items():
        given = ("--load", pruned / "hf", "--data", pruned / "text", "--max-windows", 4)
        words = ["evaluate", *given, "--seq-length", 48, *flags, "--json", tmp_path / name]
        jobs.append(Job(check="command", world=ranks, given={"words": [str(w) for w in words]}))
    for codes in launch(jobs, tmp_path / "ranks", ranks=3):
        assert set(codes) == {0}
    for name in LAYOUTS:
        found = json.loads((tmp_path / name).read_text())["loss"]
        assert found == pytest.approx(wanted, abs=1e-5), name


def test_the_report_shows_the_widths(pruned: Path, tmp_path: Path) -> None:
    ok("report", pruned / "plan.json", "--save", tmp_path / "r.html")
    widths = widths_of(pruned / "plan.json")
    page = (tmp_path / "r.html").read_text()
    assert f"{min(widths)} to {max(widths)}" in page and "FFN channels of a layer" in page


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--nonuniform",), "--nonuniform: needs --ffn-hidden-size-remain"),
        (("--nonuniform-floor", 0.5, *FFN[:2]), "--nonuniform-floor: needs --nonuniform"),
        (("--nonuniform-scores", "raw"), "--nonuniform-scores: needs --nonuniform"),
        ((*FFN, "--nonuniform-floor", 1.5), "--nonuniform-floor 1.5: is a share; wanted 0 to 1"),
        ((*FFN, "--nonuniform-floor", "nan"), "--nonuniform-floor nan"),
        ((*FFN, "--nonuniform-multiple", 36), "192 channels over 4 layers are no multiple of 36"),
        ((*FFN, "--target-params", "50K"), "--nonuniform with a budget"),
        ((*FFN, "--rounds", 2), "--nonuniform with --rounds: every round scores equal layers"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_planned_is_refused(
    flags: tuple, says: str, models: Models, tmp_path: Path
) -> None:
    refused("plan", "--load", models("gqa"), "--save", tmp_path / "p", *flags, says=says)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("kind", ["mistral", "qwen"])
def test_a_family_that_nobody_loads_so_is_refused(
    kind: str, models: Models, tmp_path: Path
) -> None:
    given = ("--load", models(kind), "--save", tmp_path / "p", *FFN)
    refused("plan", *given, says="only in family llama; prune it without --nonuniform")


def test_megatron_checkpoints_are_refused_before_a_weight_is_read(
    models: Models, pruned: Path, tmp_path: Path
) -> None:
    says = "a Megatron checkpoint: layers have "
    given = ("--save", tmp_path / "a", "--to", "megatron")
    plan = ("--plan", pruned / "plan.json")
    refused("prune", "--load", models("gqa"), *plan, *given, says=says)
    refused("convert", "--load", pruned / "hf", *given, says=says)
    assert not (tmp_path / "a").exists()


def test_what_wants_equal_layers_says_so(pruned: Path, tmp_path: Path) -> None:
    load, save = ("--load", pruned / "hf"), ("--save", tmp_path / "a")
    data = ("--data", pruned / "text", "--seq-length", 32)
    train = (
        *("--train-iters", 1, "--micro-batch-size", 1, "--global-batch-size", 1),
        *("--lr", 1e-3, "--data-path", pruned / "text", "--seq-length", 32),
    )
    for name, flags in (
        ("plan", FFN[:2]),
        ("score", ("--criterion", "wanda", *data)),
        ("profile", ("--seq-length", 32)),
        ("train", train),
        ("train", (*train, "--dry-run")),
    ):
        says = f"{name}: layers have "
        message = refused(name, *load, *save, *flags, says=says)
        assert "wanted equally many in every layer; " in message
    assert not (tmp_path / "a").exists()
