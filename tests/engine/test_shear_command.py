"""``shear`` as a user runs it: what it leaves, what it refuses, what others make of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_prune.planning.plan import load_plan
from megatron_prune.planning.scores import load_scores
from megatron_prune.store import open_source
from tests.engine.runs import rows, weights
from tests.engine.runs import words as train_words
from tests.engine.shear_runs import GQA_CUT, masks, words
from tests.launch import made_once
from tests.pico import ok, run
from tests.report.test_runs import read_csv

TARGET = {
    "hidden_size": 36, "ffn_hidden_size": 72, "num_attention_heads": 3, "num_query_groups": 3,
    "num_layers": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, corpus: Path, reference: Path) -> Path:
    """``run`` and ``pruned`` of it, as the command left them; ``said.txt``, what it said."""
    with made_once(tmp_path_factory, "shear-command") as (folder, fresh):
        if fresh:
            more = (*GQA_CUT, "--save-pruned", folder / "pruned")
            said = ok(*words(reference / "gqa", folder / "run", corpus, *more))
            (folder / "said.txt").write_text(said.out + said.err)
    return folder


def test_the_plan_is_of_the_source_and_exactly_the_target(made: Path, reference: Path) -> None:
    plan, source = load_plan(made / "run/plan.json"), open_source(reference / "gqa")
    assert plan.source_digest == source.digest and plan.criterion == "gates"
    assert {name: getattr(plan.target, name) for name in TARGET} == TARGET


def test_scores_are_the_gates_and_give_the_same_plan(made: Path, reference: Path) -> None:
    scores = load_scores(made / "run/mask_scores.safetensors")
    assert set(scores.criteria["gates"]) == set("DQFL")
    flat = torch.cat([scores.criteria["gates"][axis].flatten() for axis in "DQFL"])
    wanted = torch.sigmoid(0.8 * masks(made / "run")["parameters"] / (2 / 3))
    assert torch.equal(flat, wanted)
    plan = made / "again.json"
    ok("plan", "--load", reference / "gqa", "--scores", made / "run/mask_scores.safetensors",
       "--criterion", "gates", "--save", plan, *GQA_CUT, "--overwrite", "--seed", 5)  # fmt: skip
    assert plan.read_bytes() == (made / "run/plan.json").read_bytes()


def test_the_losses_at_the_end_are_told_and_the_pruned_models_is_the_gated_ones(made: Path) -> None:
    said = (made / "said.txt").read_text()
    told = {
        line.split(": ")[0]: float(line.split(": ")[1])
        for line in said.splitlines()
        if line.startswith("validation loss of")
    }
    gated = told["validation loss of the gates of the plan"]
    assert told["validation loss of the pruned model"] == pytest.approx(gated, rel=1e-5)
    assert abs(told["validation loss of all soft gates"] - gated) > 1e-4
    last = [row for row in rows(made / "run") if "validation loss" in row][-1]
    assert last["validation loss"] == pytest.approx(gated, abs=1e-6)


def test_it_warns_of_masks_far_from_the_target(made: Path) -> None:
    said = (made / "said.txt").read_text()
    assert "warning: heads: the masks expect" in said and "the target is 0.5000" in said


def test_the_pruned_model_is_proved_and_loads(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    said = ok("verify", "--load", made / "pruned", "--source", made / "run",
              "--plan", made / "pruned/plan.json").out  # fmt: skip
    assert "recorded gates of hidden, heads, ffn, layers" in said
    model = AutoModelForCausalLM.from_pretrained(made / "pruned")
    assert model.config.hidden_size == 36 and model.config.num_hidden_layers == 3
    gates = json.loads((made / "pruned/folding.json").read_text())["gates"]
    assert len(gates["ffn"]) == 3 and len(gates["ffn"][0]) == 72


def test_pruned_alone_is_the_same_as_at_the_end(made: Path) -> None:
    ok("shear", "--save", made / "run", "--save-pruned", made / "alone")
    first, second = (load_file(made / name / "model.safetensors") for name in ("pruned", "alone"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (made / "alone/folding.json").read_bytes() == (made / "pruned/folding.json").read_bytes()


def test_a_stopped_run_can_be_looked_at_and_goes_on(
    made: Path, tmp_path: Path, corpus: Path, reference: Path
) -> None:
    command = words(reference / "gqa", tmp_path / "run", corpus, *GQA_CUT)
    ok(*command, "--exit-interval", 3)
    assert not (tmp_path / "run/plan.json").exists()
    said = ok("shear", "--save", tmp_path / "run", "--save-pruned", tmp_path / "early")
    assert "stopped after 3 of 6 steps" in said.err
    assert open_source(tmp_path / "early").config.shape.hidden_size == 36
    ok(*command)
    for name in ("plan.json", "mask_scores.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (made / "run" / name).read_bytes()
    ours, theirs = weights(tmp_path / "run"), weights(made / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_train_does_not_lose_masks_unasked(made: Path, tmp_path: Path, corpus: Path) -> None:
    train = train_words(made / "run", tmp_path / "on", corpus)
    refused = run(*train)
    assert refused.code == 2 and "masks would be lost" in refused.err
    assert "--finetune" in refused.err
    assert not (tmp_path / "on").exists()
    ok(*train, "--finetune", "--train-iters", 3, "--exit-interval", 1)


def test_another_target_does_not_go_on(made: Path, corpus: Path, reference: Path) -> None:
    other = [
        *words(reference / "gqa", made / "run", corpus, *GQA_CUT),
        "--hidden-size-remain",
        "24",
    ]
    refused = run(*other)
    assert refused.code == 2 and "learned with target" in refused.err


def test_masks_begin_in_the_order_of_scores(tmp_path: Path, corpus: Path, reference: Path) -> None:
    """With rates of nearly nothing the plan is that of the scores."""
    scores, plan = tmp_path / "scores.safetensors", tmp_path / "plan.json"
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    criterion = "hidden=residual-energy,heads=wanda,ffn=wanda,layers=activation"
    ok("score", "--load", reference / "gqa", "--data", text, "--num-samples", 4,
       "--seq-length", 32, "--criterion", criterion, "--save", scores)  # fmt: skip
    ok("plan", "--load", reference / "gqa", "--scores", scores, "--criterion", criterion,
       "--save", plan, *GQA_CUT)  # fmt: skip
    still = ("--mask-lr", 1e-9, "--train-iters", 1, "--sparsity-warmup-iters", 1)
    begin = ("--mask-init", scores, "--mask-init-criterion", criterion, "--lr-warmup-iters", 0)
    ok(*words(reference / "gqa", tmp_path / "run", corpus, *GQA_CUT, *still, *begin))
    ours, theirs = (json.loads(x.read_text())["kept"] for x in (tmp_path / "run/plan.json", plan))
    assert ours == theirs


def test_a_size_alone_is_met_from_below(tmp_path: Path, corpus: Path, reference: Path) -> None:
    from megatron_prune.model.axes import count_parameters

    most = 60_000
    ok(*words(reference / "gqa", tmp_path / "run", corpus, "--target-params", most,
              "--save-pruned", tmp_path / "pruned"))  # fmt: skip
    source = open_source(tmp_path / "pruned")
    assert 0.9 * most < count_parameters(source.config) <= most
    held = [key for key in rows(tmp_path / "run")[0] if key.startswith("expected")]
    assert held == ["expected sparsity parameters"]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--mask-units", "groups"), "--mask-units groups: the target keeps 3 of 6 heads"),
        (("--target-params", 1000), "a size or a shape, not both"),
        (("--transformer-impl", "transformer_engine"), "gates have no place"),
        (("--mask-init", "scores.safetensors"), "give both or none"),
        (("--start-sparsity", "1"), "--start-sparsity is 1"),
        (("--mask-warmup-iters", 7), "--mask-warmup-iters is 7; wanted 0 to --train-iters 6"),
        (("--balance-for", 2), "--balance-for 2 does not divide"),
        (("--seq-length", 0), "--seq-length is missing"),
    ],
)
def test_what_cannot_work_is_refused(
    flags: Sequence[object], says: str, tmp_path: Path, corpus: Path, reference: Path
) -> None:
    refused = run(*words(reference / "gqa", tmp_path / "run", corpus, *GQA_CUT, *flags))
    assert refused.code == 2 and says in refused.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("most", "says"), [(10, "no shape"), (10**9, "the model has")])
def test_a_size_that_no_shape_has_is_refused(
    most: int, says: str, tmp_path: Path, corpus: Path, reference: Path
) -> None:
    refused = run(*words(reference / "gqa", tmp_path / "run", corpus, "--target-params", most))
    assert refused.code == 2 and f"--target-params {most}: {says}" in refused.err
    assert not (tmp_path / "run").exists()


def test_pruned_alone_takes_no_flags_of_training(made: Path, tmp_path: Path) -> None:
    refused = run("shear", "--save", made / "run", "--save-pruned", tmp_path / "x", "--bf16")
    assert refused.code == 2 and "--bf16 without --load and --train-iters" in refused.err
    refused = run("shear", "--save", tmp_path / "none", "--save-pruned", tmp_path / "x")
    assert refused.code == 2 and "has no checkpoint of a run of `shear`" in refused.err


def test_a_dry_run_tells_the_masks(tmp_path: Path, corpus: Path, reference: Path) -> None:
    said = ok(*words(reference / "gqa", tmp_path / "run", corpus, *GQA_CUT, "--dry-run"))
    assert "1 x 48 hidden to 36, 4 x 6 heads to 3, 4 x 96 ffn to 72, 1 x 4 layers to 3" in said.out
    assert not (tmp_path / "run").exists()


def test_gates_that_are_no_numbers_end_the_run(
    tmp_path: Path, corpus: Path, reference: Path
) -> None:
    command = words(
        reference / "gqa", tmp_path / "run", corpus, *GQA_CUT, "--lagrangian-lr", "1e38"
    )
    refused = run(*command, "--skip-nonfinite", 0, "--train-iters", 6)
    assert refused.code == 3 and "masks" in refused.err


def test_the_report_shows_what_the_run_told(made: Path, tmp_path: Path) -> None:
    ok("report", made / "run", "--save", tmp_path / "page.html", "--csv-dir", tmp_path / "csv")
    names = ("masks", "mask-layers", "gates")
    course, layers, gates = (read_csv(tmp_path / "csv" / f"{name}.csv") for name in names)
    last = [row for row in rows(made / "run") if "lm loss" in row][-1]
    told = {key for key in last if key.startswith(("expected", "target", "lambda"))}
    axes = {row["axis"] for row in course}
    kinds = ("expected sparsity", "target sparsity", "lambda 1", "lambda 2")
    assert axes == {"hidden", "heads", "ffn", "layers"}
    assert told == {f"{kind} {axis}" for kind in kinds for axis in axes}
    for row in course[-1], course[0]:
        wanted = next(x for x in rows(made / "run") if x["iteration"] == int(row["iteration"]))
        assert all(float(row[kind]) == wanted[f"{kind} {row['axis']}"] for kind in kinds)
    by_layer = last["share gone by layer"]
    assert {row["axis"] for row in layers} == set(by_layer) and {x["axis"] for x in gates} == axes
    assert float(layers[-1]["share gone by layer"]) == by_layer["layers"][-1]


def test_tensorboard_has_targets_and_multipliers(made: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(made / "run/tensorboard"))
    board.Reload()
    found = [row for row in rows(made / "run") if "lm loss" in row]
    for key in ("expected sparsity ffn", "target sparsity ffn", "lambda 1 ffn", "lambda 2 ffn"):
        drawn = {event.step: event.value for event in board.Scalars(key)}
        assert drawn == pytest.approx({row["iteration"]: row[key] for row in found})
    assert {"iteration", "seconds"}.isdisjoint(board.Tags()["scalars"])
