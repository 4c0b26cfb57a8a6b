"""The loss of a model on each domain of a recipe: the targets of another model's training."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_prune.data.domain_recipe import DomainRecipe, read_recipe
from megatron_prune.data.domains import weighted_mean
from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.model import ModelOptions, build_model, check_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.train.corpora import clean_cache
from megatron_prune.engine.train.domains import (
    Cut,
    build_domains,
    check_domains,
    domain_loss,
    validation_windows,
)
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.model import axes
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source


@dataclass(frozen=True, kw_only=True)
class DomainEvaluationOptions:
    """What to evaluate and how; the fields are flags of ``evaluate``, as ``train`` has them.

    Attributes:
        max_windows: of each domain; ``--eval-iters`` x ``--global-batch-size`` of the training.
    """

    load: Path
    domains: Path
    seq_length: int = 1024
    max_windows: int | None = None
    micro_batch_size: int = 1
    seed: int = 1234
    split: str = "969,30,1"
    eod_mask_loss: bool = False
    data_cache_path: Path | None = None
    tokenizer_model: Path | None = None
    dtype: str = "fp32"
    transformer_impl: str = "auto"
    sequence_parallel: bool = False
    family: str | None = None


def _model_options(options: DomainEvaluationOptions) -> ModelOptions:
    return ModelOptions(
        seq_length=options.seq_length,
        dtype=options.dtype,
        transformer_impl=options.transformer_impl,
        sequence_parallel=options.sequence_parallel,
    )


def open_for_domains(options: DomainEvaluationOptions, grid: ParallelGrid) -> Source:
    """The model, opened and checked against the options; no weight is read.

    Raises:
        ConfigError: an option does not fit the model.
        ShapeError: the layout does not fit the model.
        CheckpointError: there is no model at ``load``.
    """
    source = open_source(options.load, family=options.family)
    grid.check(source.config.shape)
    check_model(source.config, _model_options(options), grid.tensor_parallel)
    return source


@contextmanager
def _cut(options: DomainEvaluationOptions, groups: Groups) -> Iterator[Cut]:
    """With a place for Megatron's index of samples: the user's, or one that is gone afterwards."""
    given = options.data_cache_path
    cache = given or Path(on_first_rank(groups.ranks, lambda: tempfile.mkdtemp(prefix="samples-")))
    try:
        yield Cut(
            seed=options.seed,
            seq_length=options.seq_length,
            split=options.split,
            eod_mask_loss=options.eod_mask_loss,
            cache=cache,
        )
    finally:
        if given is None and groups.ranks.is_first:
            shutil.rmtree(cache, ignore_errors=True)


def evaluate_domains(
    source: Source, options: DomainEvaluationOptions, groups: Groups
) -> dict[str, Any]:
    """The loss on the validation part of each domain, on the windows a training looks at.

    Returns:
        The same on every rank: ``loss``, the mean by the recipe's weights, and of each domain its
        loss, windows and tokens; and what decided the windows.

    Raises:
        ConfigError: the recipe or a corpus cannot be used; before a weight is read.
        DamagedError: a loss is not a number.
    """
    config = source.config
    with _cut(options, groups) as cut:

        def check() -> tuple[DomainRecipe, Any]:
            recipe = read_recipe(options.domains)
            has_tokenizer = any("token" in name for name in source.companion_files)
            tokenizer = options.tokenizer_model or (options.load if has_tokenizer else None)
            facts = check_domains(
                recipe, cut, tokenizer, config.shape.vocab_size, training=False, validation=True
            )
            clean_cache(cut.cache)
            return recipe, facts

        if options.micro_batch_size < 1:
            raise ConfigError(f"--micro-batch-size is {options.micro_batch_size}; wanted 1 or more")
        recipe, facts = on_first_rank(groups.ranks, check)
        parts = build_domains(recipe, cut, facts, config.shape.vocab_size, part="validation")
        model = build_model(config, groups, _model_options(options))
        load_weights(model, source, groups)
        found: dict[str, dict[str, float]] = {}
        bar = tqdm(parts.items(), "domains", disable=not groups.ranks.is_first, file=sys.stderr)
        for name, samples in bar:
            windows = validation_windows(name, options.seed, len(samples), options.max_windows)
            loss = domain_loss(model, samples, windows, groups, options.micro_batch_size)
            if loss != loss or loss in (float("inf"), float("-inf")):
                raise DamagedError(
                    f"{options.load}: domain {name}: its loss is {loss}; the model's weights hold "
                    "values that are not finite, or --fp16 is too narrow for it"
                )
            tokens = len(windows) * options.seq_length
            found[name] = {"loss": loss, "windows": len(windows), "tokens": tokens}
    losses = {name: row["loss"] for name, row in found.items()}
    return {
        "load": str(options.load),
        "parameters": axes.count_parameters(config),
        "loss": weighted_mean(losses, recipe.weights),
        "domains": found,
        "seq_length": options.seq_length,
        "split": options.split,
        "seed": options.seed,
        "dtype": options.dtype,
    }
