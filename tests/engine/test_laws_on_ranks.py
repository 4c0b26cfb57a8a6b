"""Laws 5 and 6 on process groups: TP 2, 3, 4, PP 2, 4, DP 2 and their products.

Logits and gradients are compared with transformers', so every layout is held to one reference that
is not this code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.on_ranks import Job, launch
from tests.launch import made_once

TP2, TP3, TP4 = ({"tensor_parallel": n} for n in (2, 3, 4))
PP2, PP4 = ({"pipeline_parallel": n} for n in (2, 4))
UNEVEN = {"pipeline_parallel": 2, "first_stage_layers": 1}
TP2_PP2 = {**TP2, **PP2}
SP = {"sequence_parallel": True}
UNIFORM, BLOCK = (
    {"recompute_granularity": "full", "recompute_method": method, "recompute_num_layers": layers}
    for method, layers in (("uniform", 1), ("block", 2))
)
SELECTIVE = {"recompute_granularity": "selective"}
# kind, layout, ranks, options
LOGITS: list[tuple[str, dict[str, int], int, dict[str, Any]]] = [
    *((kind, TP3, 3, {}) for kind in ("gqa", "tied", "mha", "qwen", "all_bias", "attention_bias")),
    *((kind, TP3, 3, {}) for kind in ("mistral", "llama3")),
    *((kind, TP2, 2, {}) for kind in ("mha", "four", "qwen_tied")),
    *((kind, TP4, 4, {}) for kind in ("four", "qwen_tied")),
    *((kind, PP2, 2, {}) for kind in ("gqa", "tied", "qwen", "llama3")),
    ("qwen3", TP3, 3, {}),
    ("qwen3_tied", TP2, 2, {}),
    ("qwen3", PP2, 2, {}),
    ("tied", UNEVEN, 2, {}),
    ("tied", PP4, 4, {}),
    ("qwen_tied", TP2_PP2, 4, {}),
    ("gqa", TP3, 3, SP),
    ("all_bias", TP3, 3, SP),
]
GRADIENTS: list[tuple[str, dict[str, int], int, dict[str, Any]]] = [
    *((kind, TP3, 3, {}) for kind in ("gqa", "tied", "qwen", "all_bias", "llama3")),
    *((kind, TP3, 3, SP) for kind in ("gqa", "tied", "all_bias", "qwen3")),
    ("qwen3_tied", TP2, 2, {}),
    ("qwen3", PP2, 2, {}),
    *((kind, TP4, 4, {}) for kind in ("four", "qwen_tied")),
    *((kind, PP2, 2, {}) for kind in ("gqa", "tied")),
    ("tied", UNEVEN, 2, {}),
    ("tied", PP4, 4, {}),
    ("qwen_tied", TP2_PP2, 4, {}),
    ("gqa", {}, 2, {}),
    ("four", TP2, 4, {}),
    ("four", TP2, 4, {"use_distributed_optimizer": True}),
    ("tied", PP2, 4, {"use_distributed_optimizer": True}),
    ("four", TP2, 4, {**SP, "use_distributed_optimizer": True}),
    ("qwen_tied", TP2_PP2, 4, SP),
    *(("gqa", {}, 1, recompute) for recompute in (UNIFORM, BLOCK, SELECTIVE)),
    *(("gqa", TP3, 3, recompute) for recompute in (UNIFORM, SELECTIVE)),
    *(("gqa", TP3, 3, {**SP, **recompute}) for recompute in (UNIFORM, SELECTIVE)),
    *(("tied", PP2, 4, recompute) for recompute in (UNIFORM, BLOCK, SELECTIVE)),
]
RANDOM = [("tied", TP3, 3), ("tied", PP2, 2), ("gqa", {}, 1)]


def _name(case: tuple[Any, ...]) -> str:
    kind, layout, ranks, options = case
    words = [f"{key.split('_')[0]}{value}" for key, value in layout.items()]
    chosen = [key if value is True else f"{key}={value}" for key, value in options.items()]
    return "-".join([kind, *words, f"{ranks}ranks", *chosen])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, reference: Path) -> dict[str, list[Any]]:
    """What every rank found, by the name of the case."""
    jobs = {}
    for case in LOGITS:
        kind, layout, ranks, options = case
        given = {"load": str(reference / kind), "ids": str(reference / f"{kind}.ids.pt")}
        jobs["logits-" + _name(case)] = Job(
            check="logits", world=ranks, given={**given, "layout": layout, **options}
        )
    for case in GRADIENTS:
        kind, layout, ranks, options = case
        given = {
            "load": str(reference / kind),
            "wanted": str(reference / f"{kind}-gradients"),
            "ids": str(reference / f"{kind}.longer.pt"),
        }
        jobs["gradients-" + _name(case)] = Job(
            check="gradients", world=ranks, given={**given, "layout": layout, **options}
        )
    with made_once(tmp_path_factory, "laws-on-ranks") as (folder, fresh):
        if fresh:
            torch.save(launch(list(jobs.values()), folder), folder / "all.pt")
        results = torch.load(folder / "all.pt")
    return dict(zip(jobs, results))


def _only(results: list[Any]) -> list[Any]:
    for result in results:
        assert not isinstance(result, str), result
    return [result for result in results if result is not None]


@pytest.mark.parametrize("case", LOGITS, ids=_name)
def test_logits_equal_transformers(case: Any, found: dict[str, list[Any]], reference: Path) -> None:
    wanted = torch.load(reference / f"{case[0]}.logits.pt")
    results = _only(found["logits-" + _name(case)])
    assert results
    for logits in results:
        vocab = wanted.shape[-1]
        assert logits.shape[-1] % 128 == 0
        assert torch.isneginf(logits[..., vocab:]).all(), "padding takes part in the softmax"
        assert (logits[..., :vocab] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("case", GRADIENTS, ids=_name)
def test_gradients_equal_transformers(
    case: Any, found: dict[str, list[Any]], reference: Path
) -> None:
    wanted = json.loads((reference / f"{case[0]}.json").read_text())
    results = _only(found["gradients-" + _name(case)])
    assert len(results) == case[2]
    assert sum(one["share"] for one in results) == pytest.approx(wanted["loss"], abs=1e-5)
    for one in results:
        assert one["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
        assert all(far < 1e-6 for far in one["far"].values()), one["far"]
    named = {name for one in results for name in one["far"]}
    assert case[3].get("use_distributed_optimizer") or any("layers.3." in name for name in named)
