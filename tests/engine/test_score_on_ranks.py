"""Scores do not depend on the layout: TP 2, 3, 4, PP 2, DP 2, sequence parallel and products.

One process is held to transformers in tests/criteria; here every layout is held to one process.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.scores import Scores, load_scores
from tests import launch as processes
from tests.engine.on_ranks import Job, launch
from tests.launch import made_once
from tests.pico import TEXT, VOCAB, make_model, ok

CRITERIA = (
    *("magnitude", "activation", "wanda", "flap", "residual-energy"),
    *("taylor", "fisher", "perplexity", "perplexity-greedy"),
)
SAMPLES = 5  # by 2 copies in batches of 2: the last three places are filled up
FLAGS = (
    *("--num-samples", SAMPLES, "--seq-length", 24, "--micro-batch-size", 2),
    *("--removal-samples", 3, "--removal-layers", 2, "--criterion", ",".join(CRITERIA)),
)
TP2, TP3, TP4 = (("--tensor-model-parallel-size", n) for n in (2, 3, 4))
PP2, SP = ("--pipeline-model-parallel-size", 2), ("--sequence-parallel",)
UNEVEN = (*PP2, "--decoder-first-pipeline-num-layers", 1)
# name -> kind, ranks, flags
CASES: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "gqa-tp3": ("gqa", 3, TP3),
    "gqa-tp3-sp": ("gqa", 3, (*TP3, *SP)),
    "all_bias-tp3": ("all_bias", 3, TP3),
    "all_bias-tp3-sp": ("all_bias", 3, (*TP3, *SP)),
    "tied-pp2": ("tied", 2, PP2),
    "tied-uneven": ("tied", 2, UNEVEN),
    "tied-pp2-dp2": ("tied", 4, PP2),
    "gqa-dp2": ("gqa", 2, ()),
    "gqa-dp4": ("gqa", 4, ()),
    "four-tp2": ("four", 2, TP2),
    "four-tp2-dp2": ("four", 4, TP2),
    "four-tp2-dp2-sp": ("four", 4, (*TP2, *SP)),  # the second copy's last batch is all filling
    "qwen_tied-tp4": ("qwen_tied", 4, TP4),
    "qwen3_tied-tp2": ("qwen3_tied", 2, TP2),
    "qwen3_tied-tp2-sp": ("qwen3_tied", 2, (*TP2, *SP)),
    "qwen_tied-tp2-pp2-sp": ("qwen_tied", 4, (*TP2, *PP2, *SP)),
}
NUDGED = 1e-5  # of the largest value; the largest difference seen is 1.3e-6


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``KIND.alone`` of one process, ``CASE.ranks`` of every layout; ``fewer`` samples of gqa."""
    with made_once(tmp_path_factory, "scores-on-ranks") as (folder, fresh):
        if fresh:
            words = [*TEXT.split(), *"abcdefghijklmnop"]
            (folder / "text").write_text(" ".join(random.Random(0).choices(words, k=400)))
            jobs = []
            for name, (kind, ranks, flags) in CASES.items():
                given = ("score", "--load", folder / kind, "--data", folder / "text", *FLAGS)
                if not (folder / kind).exists():
                    make_model(folder / kind, kind, vocab_size=VOCAB)
                    ok(*given, "--save", folder / f"{kind}.alone")
                line = [str(w) for w in (*given, *flags, "--save", folder / f"{name}.ranks")]
                jobs.append(Job(check="command", world=ranks, given={"words": line}))
            ok(
                "score", "--load", folder / "gqa", "--data", folder / "text", *FLAGS,
                "--num-samples", SAMPLES - 1, "--save", folder / "fewer",
            )  # fmt: skip
            for name, codes in zip(CASES, launch(jobs, folder / "ranks")):
                assert set(codes) == {0}, (name, codes, (folder / "ranks/said.txt").read_text())
    return folder


def _far(one: Scores, other: Scores) -> dict[str, float]:
    """Criterion and axis -> the largest difference as a share of the largest value."""
    assert {n: set(x) for n, x in one.criteria.items()} == {
        n: set(x) for n, x in other.criteria.items()
    }
    return {
        f"{name}.{axis}": float((x - other.criteria[name][axis]).abs().max() / x.abs().max())
        for name, axes in one.criteria.items()
        for axis, x in axes.items()
    }


def _plans(scores: Scores) -> dict[str, Any]:
    """What every criterion keeps, on each axis that it scores."""
    shape, kept = scores.shape, {}
    groups = 1 if shape.num_query_groups == 3 else 2
    targets = {
        "D": Targets(hidden_size=30),
        "Q": Targets(num_attention_heads=shape.num_query_groups),
        "K": Targets(num_query_groups=groups),
        "F": Targets(ffn_hidden_size=48),
        "L": Targets(num_layers=2),
    }
    for name, axes in scores.criteria.items():
        for axis in (*axes, *("K" for _ in axes if _ == "Q" and "K" not in axes)):
            plan = make_plan(
                shape, targets[axis], scores.criterion(name), criterion_name=name, seed=0,
                prune_type="unbalance", balance_for=1, source_digest=scores.source_digest,
            )  # fmt: skip
            kept[f"{name}.{axis}"] = plan.kept
    return kept


@pytest.mark.parametrize("name", CASES)
def test_every_layout_finds_the_scores_of_one_process(name: str, found: Path) -> None:
    alone = load_scores(found / f"{CASES[name][0]}.alone")
    ranks = load_scores(found / f"{name}.ranks")
    assert {key: far for key, far in _far(alone, ranks).items() if not far < NUDGED} == {}
    assert set(ranks.criteria) == set(CRITERIA)
    torch.testing.assert_close(
        ranks.statistics["norm_energy"], alone.statistics["norm_energy"], rtol=1e-5, atol=1e-6
    )
    for fact in ("data_digest", "samples", "tokens", "seq_length"):
        assert ranks.provenance[fact] == alone.provenance[fact], fact
    assert ranks.provenance["samples"] == SAMPLES


@pytest.mark.parametrize("name", CASES)
def test_every_layout_makes_the_plan_of_one_process(name: str, found: Path) -> None:
    alone = _plans(load_scores(found / f"{CASES[name][0]}.alone"))
    ranks = _plans(load_scores(found / f"{name}.ranks"))
    assert set(alone) == set(ranks) and len(alone) >= 20
    assert [key for key in alone if alone[key] != ranks[key]] == []


def test_one_sample_less_is_far_away(found: Path) -> None:
    """The control: a sample lost or counted twice would show."""
    alone, fewer = load_scores(found / "gqa.alone"), load_scores(found / "fewer")
    without = {"magnitude", "perplexity", "perplexity-greedy"}  # these never saw the fifth one
    for key, far in _far(alone, fewer).items():
        name = key.partition(".")[0]
        assert far == 0 if name in without else far > 10 * NUDGED, (key, far)
    assert alone.provenance["data_digest"] != fewer.provenance["data_digest"]


def test_the_layout_is_recorded(found: Path) -> None:
    facts = load_scores(found / "four-tp2-dp2.ranks").provenance
    layout = [facts[f"{x}_parallel_size"] for x in ("tensor_model", "pipeline_model", "data")]
    assert layout == [2, 1, 2]


FAIL = """
from megatron_prune.engine.observe import score
from megatron_prune import files
def fails(*_, **__):
    raise OSError(5, "Input/output error")
if os.environ["RANK"] == "{rank}":
    {what} = fails
"""


@pytest.mark.parametrize(("rank", "what"), [(0, "files.replace_file"), (1, "score.weight_squares")])
def test_a_rank_that_fails_ends_all_with_its_name(rank: int, what: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "m", "gqa")
    stage = ("score", "--load", model, "--criterion", "magnitude", "--seq-length", 24)
    done = processes.launch(
        2, (*stage, "--save", tmp_path / "s"), prelude=FAIL.format(rank=rank, what=what)
    )
    assert [one.codes for one in done] == [[2], [2]], done
    who = "rank 1 failed: OSError: " if rank else "error: "  # the first rank speaks for all
    assert f"{who}[Errno 5] Input/output error" in done[0].err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "stage",
    [("score", "--criterion", "magnitude", "--seq-length", 24), ("profile", "--seq-length", 24)],
    ids=lambda stage: stage[0],
)
def test_ranks_with_different_arguments_all_refuse(
    stage: tuple[object, ...], tmp_path: Path
) -> None:
    given = (*stage, "--load", make_model(tmp_path / "m", "gqa"), "--save", tmp_path / "s")
    done = processes.launch(2, given, instead={1: (*given, "--seq-length", 32)})
    assert [rank.codes for rank in done] == [[2], [2]], done
    assert "--seq-length differs between ranks: rank 0 has 24, rank 1 has 32" in done[0].err
    assert not (tmp_path / "s").exists()
