"""What a search for a shape found: the table on standard output, and the file for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_prune.model.axes import count_parameters
from megatron_prune.model.costs import DTYPE_BYTES, kv_cache_bytes_per_token, sizes_of
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.planning.latency import LatencyModel
from megatron_prune.planning.search import Budget, Candidate


def _sizes(shape: ModelShape) -> dict[str, int]:
    """The table's columns of a shape."""
    return {
        "layers": shape.num_layers,
        "hidden": shape.hidden_size,
        "heads": shape.num_attention_heads,
        "groups": shape.num_query_groups,
        "ffn": shape.ffn_hidden_size,
    }


def _costs(
    config: ModelConfig, shape: ModelShape, latency: LatencyModel | None
) -> dict[str, float]:
    """The table's columns of what a shape costs."""
    after = replace(config, shape=shape)
    parameters = count_parameters(after)
    costs = {
        "params (M)": parameters / 1e6,
        "MB": parameters * DTYPE_BYTES[config.dtype] / 1e6,
        "KV kB/tok": kv_cache_bytes_per_token(after) / 1e3,
    }
    if latency is not None:
        costs["ms"] = float(latency.seconds_at(sizes_of(shape))) * 1e3
    return costs


def candidates_table(
    config: ModelConfig,
    found: Sequence[Candidate],
    losses: Sequence[float],
    latency: LatencyModel | None,
) -> str:
    """The candidates, best first, below the source. ``losses`` is as long, or empty."""
    head = "".join(f"{name:>7}" for name in _sizes(config.shape))
    costs = [*_costs(config, config.shape, latency), "proxy", *(["loss"] if losses else [])]
    rows = [f"{'':<7}{head}" + "".join(f"{name:>11}" for name in costs)]
    source = Candidate(shape=config.shape, proxy=0.0, costs={})
    for number, candidate in enumerate((source, *found)):
        shape = candidate.shape
        cells = [f"{size:>7}" for size in _sizes(shape).values()]
        cells += [f"{cost:>11.1f}" for cost in _costs(config, shape, latency).values()]
        cells.append(f"{candidate.proxy:>11.4f}")
        if losses:
            cells.append(f"{losses[number]:>11.4f}")
        rows.append(f"{number or 'source':<7}" + "".join(cells))
    return "\n".join(rows)


def candidates_json(
    config: ModelConfig,
    facts: Mapping[str, Any],
    budgets: Sequence[Budget],
    found: Sequence[Candidate],
    losses: Sequence[float],
    front: Sequence[Candidate],
) -> str:
    """The text of ``--candidates-json``.

    ``candidates`` holds the ranked ones first, with ``rank`` from 1 and ``loss`` where it was
    measured, then those of the front of ``front_cost`` against proxy, from cheap to the source.
    """

    def row(candidate: Candidate) -> dict[str, Any]:
        after = replace(config, shape=candidate.shape)
        return {
            **candidate.shape.as_dict(),
            "parameters": count_parameters(after),
            "kv_cache_bytes_per_token": kv_cache_bytes_per_token(after),
            "costs": dict(candidate.costs),
            "proxy": candidate.proxy,
        }

    ranked = [{"rank": number, **row(c)} for number, c in enumerate(found, start=1)]
    for one, loss in zip(ranked, losses):
        one["loss"] = loss
    shapes = {candidate.shape for candidate in found}
    values = {
        "source": config.shape.as_dict(),
        "source_parameters": count_parameters(config),
        **facts,
        "budgets": {b.name: {"flag": b.flag, "limit": b.limit} for b in budgets},
        "front_cost": budgets[0].name,
        "candidates": ranked + [row(c) for c in front if c.shape not in shapes],
    }
    return json.dumps(values, indent=1) + "\n"
