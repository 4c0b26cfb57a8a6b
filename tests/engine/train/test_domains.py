"""``train --domains`` and ``evaluate --domains`` in one process."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prune.engine.train.checkpoint import training_state
from tests.engine import domain_runs
from tests.engine.domain_runs import TARGETS, prefix, tables, write_recipe
from tests.engine.runs import losses, rows, told
from tests.pico import directory_bytes, ok, refused, run

Train = Callable[..., Path]


@pytest.fixture
def train(tmp_path: Path, reference: Path, corpora: Path) -> Train:
    """``train(save, *flags, recipe=...)`` runs and succeeds; returns the directory."""

    def once(save: str, *flags: object, recipe: Path | None = None) -> Path:
        recipe = recipe or write_recipe(tmp_path / "r.yaml", domain_runs.domain_rows(corpora))
        ok(*domain_runs.words(reference / "gqa", tmp_path / save, recipe, *flags))
        return tmp_path / save

    return once


@pytest.mark.parametrize("clip", [(), ("--domain-clip",)])
def test_weights_follow_the_paper_formula(train: Train, clip: tuple[str, ...]) -> None:
    found = tables(train("run", "--domain-eta", 0.5, "--domain-smoothing", 0.01, *clip))
    assert list(found) == [2, 3, 4, 6]
    weights = {"easy": 0.5, "mixed": 0.25, "small": 0.25}
    for iteration, table in found.items():
        if iteration % 2 == 0:
            raised = {}
            for name, row in table.items():
                excess = row["loss"] - TARGETS[name]
                excess = max(excess, 0) if clip else excess
                raised[name] = weights[name] * math.exp(0.5 * excess)
            total = sum(raised.values())
            weights = {name: 0.99 * x / total + 0.01 / 3 for name, x in raised.items()}
        assert {n: row["weight"] for n, row in table.items()} == pytest.approx(weights, abs=1e-12)
    assert len({row["weight"] for row in found[6].values()}) == 3


def test_the_domain_that_lags_gains_weight_and_samples(
    train: Train, tmp_path: Path, corpora: Path
) -> None:
    domains = domain_runs.domain_rows(corpora)[:2]
    for row in domains:
        row.update(weight=1, target=4.0)
    recipe = write_recipe(tmp_path / "lag.yaml", domains)
    flags = ("--train-iters", 24, "--eval-interval", 24, "--save-interval", 24)
    dynamic = train("dynamic", *flags, recipe=recipe)
    constant = train("constant", *flags, "--domain-weighting", "constant", recipe=recipe)
    last, same = tables(dynamic)[24], tables(constant)[24]
    assert last["mixed"]["weight"] > 0.6 > 0.4 > last["easy"]["weight"]
    assert last["mixed"]["token share"] > 0.6
    assert [row["weight"] for row in same.values()] == [0.5, 0.5]
    assert [row["token share"] for row in same.values()] == [0.5, 0.5]
    assert last["mixed"]["loss"] < same["mixed"]["loss"]
    gap = [abs(table["mixed"]["loss"] - table["easy"]["loss"]) for table in (last, same)]
    assert gap[0] < gap[1]


def test_what_is_told_adds_up(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    save = train("run")
    for iteration, table in tables(save).items():
        assert sum(row["tokens"] for row in table.values()) == iteration * 4 * 32
        assert math.fsum(row["token share"] for row in table.values()) == pytest.approx(1)
        mean = 0.5 * table["easy"]["loss"] + 0.25 * (
            table["mixed"]["loss"] + table["small"]["loss"]
        )
        told_mean = [
            r for r in rows(save) if "validation loss" in r and r["iteration"] == iteration
        ]
        assert told_mean[0]["validation loss"] == pytest.approx(mean)
    board = EventAccumulator(str(save / "tensorboard"))
    board.Reload()
    scalars = {e.step: e.value for e in board.Scalars("domain weight/small")}
    assert scalars == pytest.approx({n: t["small"]["weight"] for n, t in tables(save).items()})
    assert {"domain loss/easy", "domain token share/mixed"} <= set(board.Tags()["scalars"])


@pytest.mark.parametrize("stops", [(2, 4), (1, 2, 3, 4, 5), (3,)])
def test_resume_is_bitwise(train: Train, stops: tuple[int, ...]) -> None:
    """Losses, weights, counters, and so the next samples; also when stopped between updates."""
    whole = train("whole")
    for stop in stops:
        train("broken", "--exit-interval", stop)
    broken = train("broken")
    assert told(broken) == told(whole)
    last = "iter_0000006"
    assert training_state(broken / last) == training_state(whole / last)
    assert training_state(whole / last)["domains"]["start"] > 0
    weights = [
        {n: d for n, d in directory_bytes(save / last).items() if n.endswith(".distcp")}
        for save in (broken, whole)
    ]
    assert weights[0] == weights[1]


def test_an_exhausted_domain_is_told_and_goes_on(
    train: Train, tmp_path: Path, reference: Path, corpora: Path
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", domain_runs.domain_rows(corpora))
    flags = ("--global-batch-size", 16, "--domain-weighting", "constant")
    done = ok(*domain_runs.words(reference / "gqa", tmp_path / "run", recipe, *flags))
    size = training_state(tmp_path / "run" / "iter_0000006")["domains"]["sizes"]["small"]
    drawn = 6 * 16 // 4
    assert size < drawn, "the domain is not exhausted"
    assert f"domain small: exhausted, all its {size} samples" in done.err
    assert "domain easy: exhausted" not in done.err
    assert done.err.count("domain small: exhausted") == drawn // size  # each epoch once
    assert tables(tmp_path / "run")[6]["small"]["epochs"] == drawn / size


def test_evaluate_says_what_transformers_says(
    tmp_path: Path, reference: Path, corpora: Path
) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference / "gqa", dtype=torch.float32)
    held = IndexedDataset(prefix(corpora, "held"))  # unmaps what it gave when it goes
    ids = torch.tensor(held[0].astype("int64"))
    count = (len(ids) - 1) // 32
    with torch.no_grad():
        wanted = [
            float(
                model(
                    ids[None, at : at + 32],
                    labels=ids[None, at : at + 32],
                    shift_labels=ids[None, at + 1 : at + 33],
                ).loss
            )
            for at in range(0, 32 * count, 32)
        ]
    recipe = write_recipe(tmp_path / "r.yaml", domain_runs.domain_rows(corpora))
    flags = ("--seq-length", 32, "--split", "80,20,0", "--micro-batch-size", 4)
    where = ("--load", reference / "gqa", "--domains", recipe, *flags)
    done = ok("evaluate", *where, "--per-domain", "--save", tmp_path / "t.json")
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["domains"]["small"]["windows"] == count
    assert count % 4, "no microbatch is filled up"
    assert found["domains"]["small"]["loss"] == pytest.approx(sum(wanted) / count, abs=1e-5)
    assert [line.split()[0] for line in done.out.splitlines()] == [*TARGETS, "loss"]


def test_targets_of_a_file_are_the_losses_training_starts_with(
    train: Train, tmp_path: Path, reference: Path, corpora: Path
) -> None:
    """The same windows: without learning, each domain is at its target and no weight moves."""
    domains = domain_runs.domain_rows(corpora)
    for row in domains:
        del row["target"]
    recipe = write_recipe(tmp_path / "t.yaml", domains, targets=str(tmp_path / "t.json"))
    ok(
        "evaluate", "--load", reference / "gqa", "--domains", recipe, "--per-domain", "--save",
        tmp_path / "t.json", "--seq-length", 32, "--split", "80,20,0", "--seed", 5,
        "--max-windows", 4,
    )  # fmt: skip
    flags = ("--lr", 0, "--min-lr", 0, "--domain-smoothing", 0, "--train-iters", 2)
    table = tables(train("run", *flags, "--lr-warmup-iters", 0, recipe=recipe))[2]
    for row in table.values():
        assert row["loss"] == pytest.approx(row["target"], abs=1e-6)
    dry = domain_runs.words(reference / "gqa", tmp_path / "dry", recipe, "--dry-run")
    assert "measured on other windows" not in ok(*dry).err
    other = ok(*dry, "--seed", 6).err
    assert "measured on other windows than this training's (seed 5, now 6)" in other
    assert [row["weight"] for row in table.values()] == pytest.approx([0.5, 0.25, 0.25], abs=1e-6)


def test_what_cannot_be_used_is_refused_before_the_weights(
    tmp_path: Path, reference: Path, corpora: Path
) -> None:
    def recipe(number: int, **change: object) -> Path:
        domains = domain_runs.domain_rows(corpora)
        domains[number] = {k: v for k, v in (domains[number] | change).items() if v is not None}
        return write_recipe(tmp_path / "r.yaml", domains)

    def refuse(says: str, *flags: object, path: Path | None = None, code: int = 2) -> None:
        path = path or recipe(0)
        words = domain_runs.words(reference / "gqa", tmp_path / "no", path, *flags)
        refused(*words, says=says, code=code)
        assert not (tmp_path / "no").exists()

    single = [prefix(corpora, "single")]
    refuse("--data-path and --domains: give one", "--data-path", prefix(corpora, "easy"))
    refuse("--eval-iters 0: the weights of domains follow", "--eval-iters", 0)
    refuse("--domain-weighting 'clever'; wanted dynamic or", "--domain-weighting", "clever")
    refuse("--domain-smoothing is 2.0; wanted a share", "--domain-smoothing", 2)
    refuse("--domain-weight-floor 0.4: 3 domains", "--domain-weight-floor", 0.4)
    refuse("domain easy has no target loss", path=recipe(0, target=None))
    refuse("domain mixed: the training part of", path=recipe(1, prefixes=single))
    refuse("domain small: the validation part of", path=recipe(2, validation=single))
    refuse("domain easy: the validation part of", "--split", "100,0,0")
    refuse("no corpus at /nowhere", path=recipe(1, prefixes=["/nowhere"]))
    refuse("No such file", path=tmp_path / "none.yaml")
    assert (
        run(*domain_runs.words(reference / "gqa", tmp_path / "dry", recipe(0), "--dry-run")).code
        == 0
    )
    assert not (tmp_path / "dry").exists()


def test_a_run_is_not_continued_with_other_data(
    train: Train, tmp_path: Path, reference: Path, corpora: Path
) -> None:
    save = train("run", "--exit-interval", 2)
    domains = domain_runs.domain_rows(corpora)
    other = write_recipe(tmp_path / "o.yaml", domains[:2])
    refused(
        *domain_runs.words(reference / "gqa", save, other),
        says="samples an epoch of small 5, now none",
    )
    without = domain_runs.words(reference / "gqa", save, other)
    at = without.index("--domains")
    without[at : at + 2] = ["--data-path", prefix(corpora, "easy")]
    refused(*without, says="--domain-update-interval goes with --domains, which is missing")
    at = without.index("--domain-update-interval")
    del without[at : at + 2]
    refused(*without, says="its run was one with --domains, this one is without")
    assert list(losses(save)) == [1, 2]


def test_a_model_of_no_numbers_names_the_domain(
    tmp_path: Path, reference: Path, corpora: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(reference / "gqa", dtype=torch.float32)
    model.lm_head.weight.data[3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    recipe = write_recipe(tmp_path / "r.yaml", domain_runs.domain_rows(corpora))
    flags = ("--seq-length", 32, "--split", "80,20,0", "--per-domain")
    refused(
        "evaluate", "--load", tmp_path / "nan", "--domains", recipe, *flags,
        says="domain easy: its loss is nan", code=3,
    )  # fmt: skip
    target = ("--save", tmp_path / "t.json")
    where = ("--load", reference / "gqa")
    refused("evaluate", *where, says="give one of --data TEXT, --domains RECIPE and --tasks")
    refused("evaluate", *where, "--domains", recipe, *target, says="add --per-domain")
    refused("evaluate", *where, "--data", recipe, *target, says="--save goes with --domains")
