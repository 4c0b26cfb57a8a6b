"""Scores, plans and a budget search of a pico model, as a report's tests need them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Scores, score_shape, scores_bytes

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=96,
)
DIGEST = "5eed" * 16
CRITERIA = {"activation": "DQFL", "wanda": "DQF", "perplexity": "L"}
TARGETS = Targets(
    hidden_size=36, ffn_hidden_size=60, num_attention_heads=3, num_layers=3
)  # fmt: skip


def make_scores(shape: ModelShape = SHAPE, digest: str = DIGEST, **criteria: str) -> Scores:
    """Random positive scores: criterion -> its axes."""
    generator = torch.Generator().manual_seed(7)
    return Scores(
        shape=shape,
        source_digest=digest,
        criteria={
            name: {a: torch.rand(score_shape(a, shape), generator=generator) + 0.01 for a in axes}
            for name, axes in (criteria or CRITERIA).items()
        },
        provenance={"data_digest": "da7a" * 16, "tokens": 16384, "layout": {"tp": 3, "pp": 1}},
    )


def plan_of(
    scores: Scores, targets: Targets = TARGETS, expression: str = "activation", tp: int = 3
) -> PrunePlan:
    """The plan that planning makes of these scores."""
    return make_plan(
        scores.shape,
        targets,
        scores.criterion(expression),
        criterion_name=expression,
        seed=1,
        prune_type="balance" if tp > 1 else "unbalance",
        balance_for=tp,
        source_digest=scores.source_digest,
    )


def write_scores(path: Path, scores: Scores) -> Path:
    path.write_bytes(scores_bytes(scores))
    return path


def write_plan(path: Path, plan: PrunePlan) -> Path:
    path.write_text(plan.to_json())
    return path


def candidates() -> list[dict[str, Any]]:
    """Five shapes: the plan's among them, two measured; the third is worse than the second."""
    rows = []
    for number, (layers, parameters, proxy) in enumerate(
        ((4, 120_000, 0.5), (3, 61_234, 1.25), (3, 70_000, 1.5), (2, 40_000, 2.0), (2, 30_000, 3.0))
    ):
        shape = replace(
            SHAPE, num_layers=layers, hidden_size=36, ffn_hidden_size=60, num_attention_heads=3
        )
        row = {**shape.as_dict(), "parameters": parameters, "proxy": proxy}
        row["costs"] = {"bytes": 2.0 * parameters}
        rows.append(row | ({"loss": 3.14159 + number} if number in (1, 2) else {}))
    return rows


def write_search(path: Path, **facts: Any) -> Path:
    """What ``plan --candidates-json`` writes, in short."""
    values = {"source": SHAPE.as_dict(), "criterion": "activation", **facts}
    path.write_text(json.dumps({**values, "candidates": candidates()}))
    return path
