"""`plan --rounds` makes the same plan at every layout, and one process writes it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from megatron_prune.planning.plan import load_plan
from tests.engine.on_ranks import Job, launch
from tests.launch import made_once
from tests.pico import TEXT, VOCAB, make_model, ok

FLAGS = (
    *("--rounds", 3, "--num-samples", 5, "--seq-length", 24, "--balance-for", 2),
    *("--criterion", "hidden=residual-energy,heads=wanda,ffn=wanda+taylor,layers=activation"),
    *("--hidden-size-remain", 30, "--num-attention-heads-remain", 4),
    *("--ffn-hidden-size-remain", 60, "--num-layers-remain", 2),
)
TP2, PP2 = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
# name -> ranks, flags; three layers are left after the first two rounds
CASES: dict[str, tuple[int, tuple[object, ...]]] = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, ()),
    "tp2-pp2-sp": (4, (*TP2, *PP2, "--sequence-parallel")),
}
ODD = (*TP2, "--balance-for", 1, "--ffn-hidden-size-remain", 61)  # 84 channels, then 73


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``alone.json`` of one process, ``CASE.json`` of every layout, ``said.txt``."""
    with made_once(tmp_path_factory, "rounds-on-ranks") as (folder, fresh):
        if fresh:
            words = [*TEXT.split(), *"abcdefghijklmnop"]
            (folder / "text").write_text(" ".join(random.Random(0).choices(words, k=400)))
            make_model(folder / "four", "four", vocab_size=VOCAB)
            given = ("plan", "--load", folder / "four", "--data", folder / "text", *FLAGS)
            ok(*given, "--save", folder / "alone.json")
            jobs = []
            for name, (ranks, flags) in {**CASES, "odd": (2, ODD)}.items():
                line = [str(w) for w in (*given, *flags, "--save", folder / f"{name}.json")]
                jobs.append(Job(check="command", world=ranks, given={"words": line}))
            *fine, odd = launch(jobs, folder / "ranks")
            said = (folder / "ranks/said.txt").read_text()
            for name, codes in zip(CASES, fine):
                assert set(codes) == {0}, (name, codes, said)
            assert odd == [2, 2], (odd, said)
            (folder / "said.txt").write_text(said)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_every_layout_makes_the_plan_of_one_process(name: str, found: Path) -> None:
    assert (found / f"{name}.json").read_bytes() == (found / "alone.json").read_bytes()


def test_the_plan_meets_the_target(found: Path) -> None:
    target = load_plan(found / "alone.json").target
    assert (target.hidden_size, target.ffn_hidden_size, target.num_layers) == (30, 60, 2)


def test_one_rank_tells_of_each_round(found: Path) -> None:
    said = (found / "said.txt").read_text()
    assert said.count("round 1 of 3: to 3 layers, hidden 42") == len(CASES)
    assert said.count("ffn_hidden_size") == len(CASES) + 1  # the tables, and the refusal


def test_a_layout_that_a_round_does_not_take_is_refused_at_once(found: Path) -> None:
    said = (found / "said.txt").read_text()
    assert (
        "after round 2 of --rounds: tensor-model-parallel-size 2 does not divide ffn_hidden_size 73"
        in said
    )
    assert "--balance-for a multiple of 2 keeps what every round leaves divisible" in said
    assert not (found / "odd.json").exists()
