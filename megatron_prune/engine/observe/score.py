"""Scores of a model: calibration windows through the sharded model, criteria from what was seen.

The evidence that a criterion needs decides what runs: weights are read once, one forward pass gives
the statistics, one backward pass a sample the gradients, one forward pass a layer the removals.
Each finished criterion is handed on at once, so a run that is started again does not repeat it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_prune.criteria import SCORED
from megatron_prune.criteria.observed import Gradients, weight_squares
from megatron_prune.data.windows import data_digest
from megatron_prune.engine.failures import on_first_rank, together
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions, build_model
from megatron_prune.engine.forward.weights import (
    canonical_name,
    canonical_parts,
    load_weights,
)
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.observe.gradients import unit_gradients
from megatron_prune.engine.observe.hooks import observe
from megatron_prune.engine.observe.removal import greedy_removal, losses_without
from megatron_prune.engine.running import ScoreRuns
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.model.axes import count_parameters
from megatron_prune.planning.scores import Scores
from megatron_prune.sources.finite import is_finite, nonfinite_text
from megatron_prune.sources.source import CastSource, Source

SaveScores = Callable[[Scores], object]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ScoreRuns):
    """What is scored and how; see ``megatron-prune score --help``."""

    criteria: tuple[str, ...]
    model: ModelOptions

    def __post_init__(self) -> None:
        if self.model.dtype == "fp16" and (names := self.needing("gradients")):
            raise ConfigError(
                f"--fp16 with --criterion {','.join(names)}: the gradients of a mean loss vanish "
                "in float16, and nothing scales the loss here; use --bf16, or neither"
            )

    def removal_facts(self, samples: int, layers: int) -> dict[str, int]:
        """What criteria that remove layers depend on beyond the calibration: provenance."""
        facts = {}
        if any(SCORED[name].removal for name in self.criteria):
            facts["removal_samples"] = min(self.removal_samples, samples)
        if self.needing("removed"):
            facts["removal_layers"] = self.removed_layers(layers)
        return facts

    def removed_layers(self, num_layers: int) -> int:
        """How many layers are removed greedily.

        Raises:
            ConfigError: none would be left.
        """
        count = max(1, num_layers // 4) if self.removal_layers is None else self.removal_layers
        if not 1 <= count < num_layers and (
            self.needing("removed") or self.removal_layers is not None
        ):
            if num_layers == 1:
                raise ConfigError(
                    "the model has one layer, which cannot be removed: leave out --removal-layers "
                    "and the criteria that remove layers"
                )
            raise ConfigError(
                f"--removal-layers {count}: the model has {num_layers} layers; wanted 1 to "
                f"{num_layers - 1}"
            )
        return count

    def needing(self, evidence: str) -> list[str]:
        """The criteria that need some evidence."""
        return [name for name in self.criteria if evidence in SCORED[name].needs]


class _Run:
    """One model being scored."""

    def __init__(
        self,
        source: Source,
        options: ScoreOptions,
        groups: Groups,
        windows_WS: Tensor,
        scores: Scores,
        save: SaveScores,
    ) -> None:
        self.source, self.options, self.groups = source, options, groups
        self.windows, self.scores, self._save = windows_WS, scores, save
        self._evidence: dict[str, Any] = {}
        self.shape = source.config.shape
        self._model: LanguageModel | None = None

    @property
    def model(self) -> LanguageModel:
        if self._model is None:
            self._model = build_model(self.source.config, self.groups, self.options.model)
            load_weights(self._model, self.source, self.groups)
            together(self.groups.ranks, self._check_weights)
        return self._model

    def _check_weights(self) -> None:
        assert self._model is not None
        config, read = self.source.config, CastSource(self.source, self.options.model.dtype)
        for name, parameter in self._model.named_parameters():
            if not is_finite(parameter):
                parts = canonical_parts(canonical_name(name, config, self.groups), config)
                wrong = next(part for part in parts if not is_finite(read.read(part)))
                raise DamagedError(f"{nonfinite_text(read, wrong)}; nothing can be scored")

    def bar(self, total: int, what: str, unit: str = "sample") -> tqdm[Any]:
        quiet = not self.groups.ranks.is_first
        return tqdm(total=total, desc=what, unit=unit, unit_scale=unit != "sample",
                    disable=quiet, file=sys.stderr)  # fmt: skip

    def gather(self) -> None:
        """All evidence that is needed, cheapest first; what it suffices for is scored at once."""
        needed = {one for name in self.options.criteria for one in SCORED[name].needs}
        if "weights" in needed:
            self.weights()
        if "observed" in needed:
            self.forward()
        if "gradients" in needed:
            self.backward()
        if any(SCORED[name].removal for name in self.options.criteria):
            self.removal(needed)

    def found(self, **evidence: Any) -> None:
        """Score by, and hand on, what new evidence completes."""
        self._evidence |= evidence
        made = {}
        for name, scoring in SCORED.items():
            is_asked = name in self.options.criteria and not evidence.keys().isdisjoint(
                scoring.needs
            )
            if is_asked and self._evidence.keys() >= {*scoring.needs}:
                made[name] = scoring.scores(**{n: self._evidence[n] for n in scoring.needs})
                assert {*made[name]} == {*scoring.axes}, name
        if made:
            self.scores = replace(self.scores, criteria={**self.scores.criteria, **made})
            on_first_rank(self.groups.ranks, lambda: self._save(self.scores))

    def weights(self) -> None:
        """Every rank reads its share."""
        ranks = self.groups.ranks
        total = count_parameters(self.source.config) // ranks.world_size
        with self.bar(total, "weights", "value") as bar:
            found = together(
                ranks,
                lambda: weight_squares(
                    self.source, bar.update, part=ranks.rank, parts=ranks.world_size
                ),
            )
        for x in (found.readers, found.proj, found.fc2, *found.units.values()):
            moved = x.to(self.groups.device)
            dist.all_reduce(moved)
            x.copy_(moved)
        self.found(weights=found)

    def forward(self) -> None:
        model = self.model
        with self.bar(len(self.windows), "statistics") as bar:
            seen, losses = observe(
                model, self.source.config, self.windows, self.groups,
                micro_batch_size=self.options.micro_batch_size, progress=bar.update,
            )  # fmt: skip
        statistics = {
            "norm_energy": seen.norm_energy / seen.tokens,
            "calibration_loss": losses.mean().reshape(1),
        }
        self.scores = replace(self.scores, statistics={**self.scores.statistics, **statistics})
        self.found(observed=seen)

    def backward(self) -> None:
        model = self.model
        with self.bar(len(self.windows), "gradients") as bar:
            first, second = unit_gradients(
                model, self.source.config, self.windows, self.groups, progress=bar.update
            )
        self.found(gradients=Gradients(first=first, second=second, samples=len(self.windows)))

    def removal(self, needed: Collection[str]) -> None:
        model, layers = self.model, self.shape.num_layers
        facts = self.options.removal_facts(len(self.windows), layers)
        windows = self.windows[: facts["removal_samples"]]
        self.scores = replace(self.scores, provenance={**self.scores.provenance, **facts})
        if "losses_without" in needed:
            with self.bar(layers * len(windows), "without each layer") as bar:
                losses = losses_without(
                    model, layers, windows, self.groups,
                    micro_batch_size=self.options.micro_batch_size, progress=bar.update,
                )  # fmt: skip
            self.found(losses_without=losses)
        if "removed" in needed:
            count = facts["removal_layers"]
            total = sum(layers - gone for gone in range(count))
            with self.bar(total * len(windows), "layer by layer") as bar:
                removed, losses = greedy_removal(
                    model, layers, count, windows, self.groups,
                    micro_batch_size=self.options.micro_batch_size, progress=bar.update,
                )  # fmt: skip
            self.found(removed=removed, last_losses=losses)


def score(
    source: Source,
    options: ScoreOptions,
    groups: Groups,
    windows_WS: Tensor | None,
    *,
    known: Scores | None,
    save: SaveScores,
) -> Scores:
    """Score a model; the same result on every rank and, within fp32 rounding, at every layout.

    Args:
        windows_WS: [W, S] int64 calibration tokens; None when no criterion needs any.
        known: what an earlier run of the same model and data found; not computed again.
        save: called on rank 0 whenever a criterion is done.

    Raises:
        DamagedError: a weight or a statistic is not finite; names it.
    """
    todo = [n for n in options.criteria if known is None or n not in known.criteria]
    options = replace(options, criteria=tuple(todo))
    windows = torch.zeros(0, 2, dtype=torch.int64) if windows_WS is None else windows_WS
    start = Scores(
        shape=source.config.shape,
        source_digest=source.digest,
        criteria={} if known is None else known.criteria,
        provenance={
            "data_digest": data_digest(windows),
            "samples": len(windows),
            "seq_length": windows.shape[1],
            "tokens": windows.numel(),
            "dtype": options.model.dtype,
            "tensor_model_parallel_size": groups.grid.tensor_parallel,
            "pipeline_model_parallel_size": groups.grid.pipeline_parallel,
            "data_parallel_size": groups.data_parallel,
        },
    )
    if known is not None and known.provenance.get("tokens"):
        start = known  # else it has no calibration of its own, and may be given one
    run = _Run(source, options, groups, windows, start, save)
    run.gather()
    return run.scores
