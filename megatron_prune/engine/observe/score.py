"""Scores of a model: calibration windows through the sharded model, criteria from what was seen.

What a criterion needs decides what runs: weights are read once, one forward pass gives the
statistics, one backward pass a sample the gradients, one forward pass a layer the removals. Each
finished criterion is handed on at once, so a run that is started again does not repeat it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_prune.criteria import SCORED
from megatron_prune.criteria.activation import activation_scores
from megatron_prune.criteria.magnitude import magnitude_scores
from megatron_prune.criteria.observed import Observed, WeightSquares, weight_squares
from megatron_prune.criteria.perplexity import greedy_scores, perplexity_scores
from megatron_prune.criteria.residual_energy import residual_energy_scores
from megatron_prune.criteria.taylor import taylor_scores
from megatron_prune.criteria.wanda import flap_scores, wanda_scores
from megatron_prune.data.windows import data_digest
from megatron_prune.engine.failures import on_first_rank, together
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions, build_model
from megatron_prune.engine.forward.weights import canonical_name, load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.observe.gradients import unit_gradients
from megatron_prune.engine.observe.hooks import observe
from megatron_prune.engine.observe.removal import greedy_removal, losses_without
from megatron_prune.engine.running import ScoreRuns
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.model.axes import count_parameters
from megatron_prune.planning.scores import Scores
from megatron_prune.sources.digest import source_digest
from megatron_prune.sources.source import Source

Saver = Callable[[Scores], object]
Found = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions(ScoreRuns):
    """What is scored and how; see ``megatron-prune score --help``."""

    criteria: tuple[str, ...]
    model: ModelOptions

    def __post_init__(self) -> None:
        if self.model.dtype == "fp16" and (names := self.needs("backward")):
            raise ConfigError(
                f"--fp16 with --criterion {','.join(names)}: the gradients of a mean loss vanish "
                "in float16, and nothing scales the loss here; use --bf16, or neither"
            )

    def removal_facts(self, samples: int, layers: int) -> dict[str, int]:
        """What criteria that remove layers depend on beyond the calibration: provenance."""
        facts = {}
        if self.needs("removal"):
            facts["removal_samples"] = min(self.removal_samples, samples)
        if "perplexity-greedy" in self.criteria:
            facts["removal_layers"] = self.removed_layers(layers)
        return facts

    def removed_layers(self, num_layers: int) -> int:
        """How many layers perplexity-greedy removes.

        Raises:
            ConfigError: none would be left.
        """
        count = max(1, num_layers // 4) if self.removal_layers is None else self.removal_layers
        greedy = "perplexity-greedy" in self.criteria
        if not 1 <= count < num_layers and (greedy or self.removal_layers is not None):
            raise ConfigError(
                f"--removal-layers {count}: the model has {num_layers} layers; wanted 1 to "
                f"{num_layers - 1}"
            )
        return count

    def needs(self, what: str) -> list[str]:
        """The criteria that need ``forward``, ``backward``, ``weights`` or ``removal``."""
        return [name for name in self.criteria if getattr(SCORED[name], what)]


class _Run:
    """One model being scored."""

    def __init__(
        self,
        source: Source,
        options: ScoreOptions,
        groups: Groups,
        windows_WS: Tensor,
        scores: Scores,
        save: Saver,
    ) -> None:
        self.source, self.options, self.groups = source, options, groups
        self.windows, self.scores, self._save = windows_WS, scores, save
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
        for name, parameter in self._model.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise DamagedError(
                    f"{self.source.path}: {canonical_name(name, self.source.config, self.groups)} "
                    f"holds values that are not finite (in {self.options.model.dtype})"
                )

    def bar(self, total: int, what: str, unit: str = "sample") -> tqdm[Any]:
        quiet = not self.groups.ranks.is_first
        return tqdm(total=total, desc=what, unit=unit, unit_scale=unit != "sample",
                    disable=quiet, file=sys.stderr)  # fmt: skip

    def keep(self, found: Found, statistics: Mapping[str, Tensor] | None = None) -> None:
        """Hand on what was asked for of what was found."""
        asked = {n: axes for n, axes in found.items() if n in self.options.criteria}
        assert all({*axes} == {*SCORED[name].axes} for name, axes in asked.items())
        self.scores = replace(
            self.scores,
            criteria={**self.scores.criteria, **asked},
            statistics={**self.scores.statistics, **(statistics or {})},
        )
        if asked:
            on_first_rank(self.groups.ranks, lambda: self._save(self.scores))

    def weights(self) -> WeightSquares:
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
        return found

    def forward(self, weights: WeightSquares | None) -> None:
        model = self.model
        with self.bar(len(self.windows), "statistics") as bar:
            seen, losses = observe(
                model, self.shape, self.windows, self.groups,
                micro_batch_size=self.options.micro_batch_size, progress=bar.update,
            )  # fmt: skip
        statistics = {
            "norm_energy": seen.norm_energy / seen.tokens,
            "calibration_loss": losses.mean().reshape(1),
        }
        self.keep(from_observed(seen, weights), statistics)

    def backward(self) -> None:
        model = self.model
        with self.bar(len(self.windows), "gradients") as bar:
            first, second = unit_gradients(
                model, self.source.config, self.windows, self.groups, progress=bar.update
            )
        samples = len(self.windows)
        self.keep(
            {"taylor": taylor_scores(first, samples), "fisher": taylor_scores(second, samples)}
        )

    def removal(self, kinds: Sequence[str]) -> None:
        model, layers = self.model, self.shape.num_layers
        facts = self.options.removal_facts(len(self.windows), layers)
        windows = self.windows[: facts["removal_samples"]]
        self.scores = replace(self.scores, provenance={**self.scores.provenance, **facts})
        if "perplexity" in kinds:
            with self.bar(layers * len(windows), "without each layer") as bar:
                losses = losses_without(
                    model, layers, windows, self.groups,
                    micro_batch_size=self.options.micro_batch_size, progress=bar.update,
                )  # fmt: skip
            self.keep({"perplexity": perplexity_scores(losses)})
        if "perplexity-greedy" in kinds:
            count = facts["removal_layers"]
            total = sum(layers - gone for gone in range(count))
            with self.bar(total * len(windows), "layer by layer") as bar:
                removed, losses = greedy_removal(
                    model, layers, count, windows, self.groups,
                    micro_batch_size=self.options.micro_batch_size, progress=bar.update,
                )  # fmt: skip
            self.keep({"perplexity-greedy": greedy_scores(removed, losses)})


def from_observed(seen: Observed, weights: WeightSquares | None) -> Found:
    """Every criterion that follows from one forward pass (and the sizes of weights)."""
    found = {
        "activation": activation_scores(seen),
        "residual-energy": residual_energy_scores(seen),
    }
    if weights is not None:
        found["wanda"] = wanda_scores(seen, weights)
        found["flap"] = flap_scores(seen, weights)
    return found


def score(
    source: Source,
    options: ScoreOptions,
    groups: Groups,
    windows_WS: Tensor | None,
    *,
    known: Scores | None,
    save: Saver,
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
        source_digest=source_digest(source),
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
    weights = None
    if options.needs("weights"):
        weights = run.weights()
        run.keep({"magnitude": magnitude_scores(weights)})
    if options.needs("forward"):
        run.forward(weights)
    if options.needs("backward"):
        run.backward()
    if kinds := options.needs("removal"):
        run.removal(kinds)
    return run.scores
