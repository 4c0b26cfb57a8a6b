"""`plan --rounds`: what it makes, what it tells, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_prune.planning.plan import load_plan
from tests.pico import TEXT, ok, refused

Models, Shards = Callable[[str], Path], Callable[..., Path]
SIZES = ("--seq-length", 24, "--num-samples", 4)
TARGETS = (
    *("--hidden-size-remain", 30, "--num-attention-heads-remain", 3),
    *("--ffn-hidden-size-remain", 60, "--num-layers-remain", 2),
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT * 40)
    return path


@pytest.mark.parametrize(
    "criterion",
    ["activation", "hidden=residual-energy,activation+2*wanda,layers=perplexity-greedy"],
)
def test_one_round_is_score_and_plan(
    criterion: str, models: Models, text: Path, tmp_path: Path
) -> None:
    names = "activation,residual-energy,wanda,perplexity-greedy"
    load, data = ("--load", models("gqa")), ("--data", text, *SIZES)
    greedy = ("--removal-layers", 2)
    ok("score", *load, *data, *greedy, "--criterion", names, "--save", tmp_path / "s")
    plan = ("plan", *load, *TARGETS, "--balance-for", 3, "--criterion", criterion)
    ok(*plan, "--scores", tmp_path / "s", "--save", tmp_path / "a")
    ok(*plan, "--rounds", 1, *data, "--save", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_more_rounds_meet_the_target_and_decide_otherwise(
    models: Models, text: Path, tmp_path: Path
) -> None:
    """Their plan is one that prune, verify and report take."""
    load, data = ("--load", models("gqa")), ("--data", text, *SIZES)
    plan = ("plan", *load, *TARGETS, "--balance-for", 3, "--criterion", "activation", *data)
    ok(*plan, "--rounds", 1, "--save", tmp_path / "1.json")
    done = ok(*plan, "--rounds", 3, "--save", tmp_path / "3.json")
    one, three = load_plan(tmp_path / "1.json"), load_plan(tmp_path / "3.json")
    assert one.target == three.target and one.source_digest == three.source_digest
    assert one.kept != three.kept
    assert (one.criterion, three.criterion) == ("activation", "activation (3 rounds)")
    for number, words in enumerate(
        ("3 layers, hidden 42, 6 heads", "3 layers, hidden 36, 3 heads", "2 layers, hidden 30"), 1
    ):
        assert f"round {number} of 3: to {words}" in done.err
    assert [line.split()[-1] for line in done.out.splitlines() if "hidden_size" in line] == [
        "30", "60",
    ]  # fmt: skip
    pruned = ("--save", tmp_path / "m", "--to", "hf")
    ok("prune", *load, "--plan", tmp_path / "3.json", *pruned)
    ok("verify", "--load", tmp_path / "m", "--source", models("gqa"), "--plan", tmp_path / "3.json")
    ok("score", *load, *data, "--criterion", "activation", "--save", tmp_path / "s")
    ok("report", tmp_path / "s", tmp_path / "3.json", "--save", tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "chosen by activation (3 rounds), which the scores do not hold" in page


def test_a_round_that_changes_nothing_scores_nothing(
    models: Models, text: Path, tmp_path: Path
) -> None:
    given = ("plan", "--load", models("gqa"), "--criterion", "activation", "--data", text, *SIZES)
    layers = ("--num-layers-remain", 3)
    done = ok(*given, "--rounds", 4, *layers, "--save", tmp_path / "4")
    assert [line for line in done.err.splitlines() if ": to " in line] == [
        "megatron-prune: round 3 of 4: to 3 layers, hidden 48, 6 heads in 3 groups, FFN 96"
    ]
    ok(*given, "--rounds", 1, *layers, "--save", tmp_path / "1")
    kept = [json.loads((tmp_path / name).read_text())["kept"] for name in ("1", "4")]
    assert kept[0] == kept[1]


def test_named_layers_go_round_by_round(models: Models, text: Path, tmp_path: Path) -> None:
    """Layers need no criterion then; the one named axis is enough."""
    given = ("plan", "--load", models("gqa"), "--criterion", "hidden=residual-energy")
    more = ("--data", text, *SIZES, "--drop-layers", "2,0", "--hidden-size-remain", 36)
    done = ok(*given, *more, "--rounds", 2, "--save", tmp_path / "p")
    plan = load_plan(tmp_path / "p")
    assert plan.layers == (1, 3) and plan.target.hidden_size == 36
    assert "round 1 of 2: to 3 layers, hidden 42" in done.err


def test_only_what_a_round_decides_is_scored(models: Models, text: Path, tmp_path: Path) -> None:
    given = ("plan", "--load", models("gqa"), "--data", text, *SIZES, "--rounds", 2)
    criterion = ("--criterion", "hidden=residual-energy,layers=perplexity")
    done = ok(*given, *criterion, "--hidden-size-remain", 36, "--save", tmp_path / "p")
    assert "statistics" in done.err and "without each layer" not in done.err


def test_magnitude_needs_no_text(models: Models, tmp_path: Path) -> None:
    given = ("plan", "--load", models("gqa"), "--criterion", "magnitude", *TARGETS)
    ok(*given, "--rounds", 2, "--save", tmp_path / "p")
    assert load_plan(tmp_path / "p").target.ffn_hidden_size == 60


def test_a_dry_run_writes_nothing(models: Models, tmp_path: Path) -> None:
    given = ("plan", "--load", models("gqa"), "--criterion", "magnitude", *TARGETS)
    ok(*given, "--rounds", 2, "--save", tmp_path / "p", "--dry-run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--rounds", 0), "--rounds 0: wanted 1 or more"),
        (("--rounds", "two"), "invalid int value: 'two'"),
        (("--criterion", "random"), "random is no criterion to score again; wanted some of magnit"),
        (("--criterion", "activation+best"), "best is no criterion to score again"),
        (("--criterion", "activation,heads=random"), "random is no criterion"),
        (("--criterion", "x*activation"), "'x' is not a weight"),
        (("--criterion", "perplexity"), "perplexity does not score hidden; those that do: magnit"),
        (("--criterion", "heads=wanda"), "says nothing of hidden; add hidden=NAME (magnitude, act"),
        (("--scores", "s"), "--rounds with --scores s: every round scores for itself"),
        (("--target-params", "1e5"), "--rounds with a budget: choose the shape first"),
        (("--data", "/nowhere"), "/nowhere: is not there"),
        (("--tokenizer-model", "/nowhere"), "/nowhere: is not there"),
        (("--seq-length", 200), "--seq-length 200 is more than the model's max_position"),
        (("--hidden-size-remain", 49), "--hidden-size-remain 49: the model has 48"),
        (("--ffn-hidden-size-remain", 50, "--balance-for", 3), "50 over 3 tensor-parallel ranks"),
        (("--tensor-model-parallel-size", 3), "1 processes do not make whole models"),
        (("--decoder-first-pipeline-num-layers", 1), "the stages are laid out anew"),
        (("--save", "{folder}"), "is a directory; wanted a file"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_planned_in_rounds_is_refused_and_leaves_nothing(
    flags: tuple[object, ...], says: str, models: Models, text: Path, tmp_path: Path
) -> None:
    given = ("--criterion", "activation", "--rounds", 2, "--hidden-size-remain", 36)
    save = ("--data", text, *SIZES, "--save", tmp_path / "p")
    words = [str(flag).format(folder=tmp_path) for flag in flags]
    message = refused("plan", "--load", models("gqa"), *given, *save, *words, says=says)
    assert "round 1 of" not in message and list(tmp_path.iterdir()) == []


def test_rounds_ask_for_text_and_for_a_target(models: Models, text: Path, tmp_path: Path) -> None:
    given = ("plan", "--load", models("gqa"), "--criterion", "activation", "--save", tmp_path / "p")
    refused(*given, "--rounds", 2, *TARGETS, says="--data is missing: activation look at the model")
    refused(*given, "--rounds", 2, "--data", text, says="--rounds without a target: say what is")
    whole = ("--hidden-size-remain", 48)
    refused(*given, "--rounds", 2, "--data", text, *whole, says="scores have nothing to decide")
    named = ("--drop-layers", 1)
    refused(*given, "--rounds", 2, "--data", text, *named, says="scores have nothing to decide")


def test_flags_of_rounds_are_refused_without_them(
    models: Models, text: Path, tmp_path: Path
) -> None:
    given = ("plan", "--load", models("gqa"), "--save", tmp_path / "p", *TARGETS)
    for flags in (("--data", text), ("--bf16",), ("--tensor-model-parallel-size", 2)):
        says = f"{flags[0]}: belongs to --rounds, which is not given"
        refused(*given, *flags, says=says)
