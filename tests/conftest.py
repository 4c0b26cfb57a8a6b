"""What holds for all tests: one thread a process, nothing from a hub; and pico checkpoints."""

from __future__ import annotations

import gc
import os

# Before torch is imported: tests run side by side and start ranks of their own, and more threads
# than cores make a collective wait for a rank that is not running.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import launch, pico

# The same examples on every machine and in every run, and nothing left in the checkout.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")


def pytest_collection_finish() -> None:
    """What is imported stays: a full collection need not look at it (`launch.free_groups`)."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """In this process only: no test here outlives a power cut, and flushing took half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_process_stays() -> Iterator[None]:
    yield
    launch.close()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Kind of `pico.KINDS` -> its Hugging Face directory. Never write into it: that is checked."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def model(kind: str) -> Path:
        if kind not in made:
            made[kind] = pico.directory_bytes(pico.make_model(root / kind, kind))
        return root / kind

    yield model
    for kind, before in made.items():
        assert pico.directory_bytes(root / kind) == before, f"the input {kind} was changed"


@pytest.fixture(scope="session")
def shards(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Path]]:
    """``shards(kind, format, tp, pp)`` -> the kind as a Megatron checkpoint. Never write there."""
    root, made = tmp_path_factory.mktemp("shards"), {}

    def checkpoint(kind: str, ckpt_format: str = "torch", tp: int = 3, pp: int = 1) -> Path:
        name = f"{kind}-{ckpt_format}-{tp}-{pp}"
        if name not in made:
            layout = ("--tensor-model-parallel-size", tp, "--pipeline-model-parallel-size", pp)
            to = ("--to", "megatron", "--ckpt-format", ckpt_format)
            pico.ok("convert", "--load", models(kind), "--save", root / name, *to, *layout)
            made[name] = pico.directory_bytes(root / name)
        return root / name

    yield checkpoint
    for name, before in made.items():
        assert pico.directory_bytes(root / name) == before, f"the input {name} was changed"


PRUNE_FLAGS: dict[str, tuple[object, ...]] = {
    "gqa": (
        *("--hidden-size-remain", 36, "--num-attention-heads-remain", 3),
        *("--ffn-hidden-size-remain", 60, "--drop-layers", "1", "--balance-for", 3),
    ),
    "mha": (
        *("--num-attention-heads-remain", 3, "--ffn-hidden-size-remain", 48),
        *("--drop-layers", "0,2", "--balance-for", 3),
    ),
    "mqa": ("--num-attention-heads-remain", 2, "--hidden-size-remain", 31),
    "four": (
        *("--num-query-groups-remain", 2, "--num-attention-heads-remain", 2),
        *("--ffn-hidden-size-remain", 40, "--balance-for", 2),
    ),
}


@pytest.fixture(scope="session")
def plans(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Kind -> a plan that prunes several of its axes."""
    root = tmp_path_factory.mktemp("plans")
    like = {"qwen_tied": "four", "qwen3_tied": "four"}

    def plan(kind: str) -> Path:
        path = root / f"{kind}.json"
        if not path.exists():
            flags = PRUNE_FLAGS[like.get(kind, kind if kind in PRUNE_FLAGS else "gqa")]
            pico.ok("plan", "--load", models(kind), "--save", path, *flags, "--seed", 3)
        return path

    return plan
