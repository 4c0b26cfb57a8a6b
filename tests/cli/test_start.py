"""Ranks started otherwise: all end with 2 and say what differs, before a group is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import COMMAND, fork, free_port, launch
from tests.pico import run

LOAD, TEXT = ("--load", "/nowhere/model"), "/nowhere/text"
FFN = ("--ffn-hidden-size-remain", 48)
COMMANDS: dict[str, tuple[object, ...]] = {  # all that run on ranks
    "train": (
        *("train", *LOAD, "--save", "s", "--data-path", "c", "--micro-batch-size", 1),
        *("--lr", "1e-3", "--seq-length", 16, "--train-iters", 2),
    ),
    "score": ("score", *LOAD, "--save", "s", "--criterion", "magnitude"),
    "evaluate": ("evaluate", *LOAD, "--data", TEXT),
    "generate": ("generate", *LOAD, "--prompt", "a"),
    "profile": ("profile", *LOAD, "--save", "s", "--seq-length", 24),
    "plan --rounds": (
        *("plan", *LOAD, "--save", "s", "--rounds", 2, "--criterion", "magnitude", *FFN),
    ),
    "prune --repair": (
        *("prune", *LOAD, "--save", "s", "--to", "hf", "--repair", "--data", TEXT, *FFN),
    ),
    "convert": ("convert", *LOAD, "--save", "s", "--to", "megatron"),
    "reshard": ("reshard", *LOAD, "--save", "s"),
    "vocab prune": ("vocab", "prune", *LOAD, "--save", "s", "--to", "hf", "--plan", "p"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_another_layout_on_one_rank_ends_all(name: str) -> None:
    """A layout that rank 1 would refuse by itself, too: rank 0 would wait for it."""
    words = COMMANDS[name]
    for size in (2, 3):
        other = (*words, "--tensor-model-parallel-size", size)
        done = launch(2, words, instead={1: other})
        assert [rank.codes for rank in done] == [[2], [2]], done
        says = "--tensor-model-parallel-size differs between ranks: rank 0 has 1, rank 1 has"
        assert f"{says} {size}" in done[0].err


def test_all_of_several_ranks_are_told() -> None:
    words = COMMANDS["train"]
    done = launch(4, words, instead={2: (*words, "--bf16")})
    assert [rank.codes for rank in done] == [[2]] * 4, done
    assert "--bf16/--fp16 differs between ranks: rank 0 has fp32, rank 2 has bf16" in done[0].err


def test_another_command_ends_all() -> None:
    done = launch(2, COMMANDS["score"], instead={1: COMMANDS["convert"]})
    assert [rank.codes for rank in done] == [[2], [2]], done
    assert "the command differs between ranks: rank 0 has score, rank 1 has conv" in done[0].err


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("more", [("--tensor-paralel-size", 2), ("--config", "/nowhere.yaml")])
def test_a_rank_that_refuses_its_command_line_ends_the_others(
    rank: int, more: tuple[object, ...], tmp_path: Path
) -> None:
    """They would wait for it for ten minutes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    words, files = COMMANDS["score"], [(tmp_path / f"{i}.o", tmp_path / f"{i}.e") for i in (0, 1)]
    ranks = [
        fork(COMMAND, (*words, *more) if i == rank else words, files[i], RANK=f"{i}", **place)
        for i in (0, 1)
    ]
    assert [one.wait() for one in ranks] == [2, 2], files[0][1].read_text()
    if rank == 1:  # rank 0 speaks for all
        assert "rank 1 refused its command line; see what it said" in files[0][1].read_text()
    else:
        assert "--tensor-paralel-size" in files[0][1].read_text() or "/nowhere" in (
            files[0][1].read_text()
        )


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; wanted a number"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'; wanted a number"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 of WORLD_SIZE 0"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x'; wanted a number"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'; wanted a num"),
    ],
)
def test_what_no_launcher_sets_is_refused(
    variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run(*COMMANDS["evaluate"])
    assert done.code == 5 and says in done.err, done


@pytest.mark.parametrize("worlds", [(2, 3), (3, 2)])
def test_another_number_of_ranks_ends_all(worlds: tuple[int, int], tmp_path: Path) -> None:
    """Two that were started, one of which believes in a third."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    files = [(tmp_path / f"{rank}.out", tmp_path / f"{rank}.err") for rank in range(2)]
    ranks = [
        fork(COMMAND, COMMANDS["score"], said, RANK=f"{rank}", WORLD_SIZE=f"{world}", **place)
        for rank, (world, said) in enumerate(zip(worlds, files))
    ]
    for rank in ranks:
        assert rank.wait() == 2, files[0][1].read_text()
    says = f"WORLD_SIZE differs between ranks: rank 0 has {worlds[0]}, rank 1 has {worlds[1]}"
    assert says in files[0][1].read_text()


def test_a_rank_that_does_not_come_ends_the_others(tmp_path: Path) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = tmp_path / "out", tmp_path / "err"
    words = (*COMMANDS["score"], "--distributed-timeout-minutes", 0.02)
    assert fork(COMMAND, words, said, RANK="0", WORLD_SIZE="2", **place).wait() == 5
    assert "rank 0 of 2: not all ranks have started within 0.02 minutes" in said[1].read_text()


def test_a_world_without_an_address_is_refused(tmp_path: Path) -> None:
    said = tmp_path / "out", tmp_path / "err"
    assert fork(COMMAND, COMMANDS["score"], said, RANK="0", WORLD_SIZE="2").wait() == 2
    assert "MASTER_ADDR and MASTER_PORT not set; start ranks with torchrun" in said[1].read_text()
