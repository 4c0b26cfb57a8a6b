"""Megatron-Core itself reads what we write, and we read what it writes.

Two ranks at TP=2 and at PP=2 load our directories, every key accounted for, into a GPTModel of NaN
whose logits have to be transformers'; then they save it with Megatron's own writers, with optimizer
state and nothing of ours, and our readers have to give back the source bit by bit.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launch import fork_ranks, free_port, made_once, wait
from tests.pico import IDS, assert_same, ok, tensors

Models = Callable[[str], Path]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
FIRST = "--decoder-first-pipeline-num-layers"
SCRIPT = Path(__file__).with_name("megatron_ranks.py")
# kind, layout, our flags for it
CASES: list[tuple[str, dict[str, int], tuple[Any, ...]]] = [
    ("four", {"tensor_parallel": 2}, (TP, 2)),
    ("qwen_tied", {"tensor_parallel": 2}, (TP, 2)),
    ("tied", {"pipeline_parallel": 2}, (PP, 2)),
    ("qwen", {"pipeline_parallel": 2, "first_stage_layers": 1}, (PP, 2, FIRST, 1)),
    ("all_bias", {"pipeline_parallel": 2}, (PP, 2)),
]
SAVES = ("stacked", "per-layer", "legacy")


@pytest.fixture(scope="module")
def megatron(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks of Megatron have done all jobs."""
    with made_once(tmp_path_factory, "megatron") as (folder, fresh):
        if fresh:
            prepare(folder, models)
            said = folder / "said.txt"
            wait(fork_ranks({"file": str(SCRIPT)}, [[folder]] * 2, [(said, said)] * 2))
    return folder


def prepare(folder: Path, models: Models) -> None:
    """Every case written for the ranks that will read it, and for one; and what they are to do."""
    jobs = []
    for kind, grid, flags in CASES:
        load = {}
        for name, layout in (("dist", flags), ("dist-from-1", ())):
            to = ("--to", "megatron", *layout)
            ok("convert", "--load", models(kind), "--save", folder / f"in-{kind}-{name}", *to)
            load[name] = str(folder / f"in-{kind}-{name}/iter_0000001")
        to = ("--to", "megatron", "--ckpt-format", "torch", "--transformer-impl", "local", *flags)
        ok("convert", "--load", models(kind), "--save", folder / f"in-{kind}-legacy", *to)
        load["legacy"] = str(folder / f"in-{kind}-legacy/iter_0000001")
        jobs.append(
            {
                "name": kind, "source": str(models(kind)), "grid": grid, "load": load,
                "save": SAVES, "port": free_port(),
            }
        )  # fmt: skip
    (folder / "jobs.json").write_text(json.dumps(jobs))


def said(folder: Path) -> str:
    return (folder / "said.txt").read_text()[-3000:]


@pytest.mark.parametrize("written", ["dist", "dist-from-1", "legacy"])
@pytest.mark.parametrize("kind", [kind for kind, *_ in CASES])
def test_megatron_loads_what_we_write_and_computes_transformers_logits(
    kind: str, written: str, megatron: Path, models: Models
) -> None:
    from transformers import AutoModelForCausalLM

    file = megatron / f"{kind}-{written}.pt"
    assert file.exists(), said(megatron)
    found = torch.load(file)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(models(kind))(IDS).logits
    vocab = wanted.shape[-1]
    assert (found[..., :vocab] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert torch.isneginf(found[..., vocab:]).all(), "padding takes no part in the softmax"


@pytest.mark.parametrize("saved", SAVES)
@pytest.mark.parametrize("kind", [kind for kind, *_ in CASES])
def test_we_read_what_megatron_writes(
    kind: str, saved: str, megatron: Path, models: Models, tmp_path: Path
) -> None:
    root = megatron / f"{kind}-{saved}"
    assert (root / "latest_checkpointed_iteration.txt").exists(), said(megatron)
    out = ("--save", tmp_path / "b", "--to", "hf")
    done = ok("convert", "--load", root, *out)
    assert "nothing can be verified" in done.err
    assert_same(tensors(tmp_path / "b"), tensors(models(kind)))


@pytest.mark.parametrize("saved", SAVES)
def test_optimizer_state_is_dropped_and_said_so(saved: str, megatron: Path, tmp_path: Path) -> None:
    given = ("--load", megatron / f"four-{saved}", "--save", tmp_path / "b", "--to", "hf")
    done = ok("prune", *given, "--drop-layers", 1)
    assert "its optimizer's state, its schedule and its iteration are dropped" in done.err


def test_what_megatron_wrote_is_inspected_and_resharded(megatron: Path, tmp_path: Path) -> None:
    root = megatron / "qwen_tied-stacked"
    facts = json.loads(ok("inspect", root, "--json").out)
    assert facts["family"] == "qwen2" and facts["tied"] is True and facts["iteration"] == 7
    assert facts["tensor_model_parallel_size"] == 2 and facts["shape"]["vocab_size"] == 379
    ok("reshard", "--load", root, "--save", tmp_path / "r", TP, 4)
    assert len(list((tmp_path / "r").rglob("*.distcp"))) == 4
