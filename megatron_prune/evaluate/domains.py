"""The loss of a model on each domain of a recipe: the targets of another model's training."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_prune.data.domain_recipe import DomainRecipe, read_recipe
from megatron_prune.data.domains import weighted_mean
from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.model import ModelOptions, build_model
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
from megatron_prune.errors import DamagedError
from megatron_prune.evaluate.options import Bar, EvaluateOptions
from megatron_prune.model import axes
from megatron_prune.sources.source import Source


@contextmanager
def _cut(options: EvaluateOptions, groups: Groups) -> Iterator[Cut]:
    """With a place for Megatron's index of samples: the user's, or one that is gone afterwards."""
    given = options.data_cache_path
    cache = given or Path(on_first_rank(groups.ranks, lambda: tempfile.mkdtemp(prefix="samples-")))
    try:
        yield Cut(
            seed=options.seed,
            seq_length=options.window_length,
            split=options.split,
            eod_mask_loss=options.eod_mask_loss,
            cache=cache,
        )
    finally:
        if given is None and groups.ranks.is_first:
            shutil.rmtree(cache, ignore_errors=True)


def evaluate_domains(
    source: Source, options: EvaluateOptions, groups: Groups, bar: Bar
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
            assert options.domains is not None
            recipe = read_recipe(options.domains)
            has_tokenizer = any("token" in name for name in source.companion_files)
            tokenizer = options.tokenizer_model or (options.load if has_tokenizer else None)
            facts = check_domains(
                recipe, cut, tokenizer, config.shape.vocab_size, training=False, validation=True
            )
            clean_cache(cut.cache)
            return recipe, facts

        recipe, facts = on_first_rank(groups.ranks, check)
        parts = build_domains(recipe, cut, facts, config.shape.vocab_size, part="validation")
        model = build_model(config, groups, ModelOptions.of(options, options.window_length))
        load_weights(model, source, groups)
        found: dict[str, dict[str, float]] = {}
        with bar() as start:
            progress = start(len(parts))
            for name, samples in parts.items():
                windows = validation_windows(name, options.seed, len(samples), options.max_windows)
                loss = domain_loss(model, samples, windows, groups, options.micro_batch_size)
                if loss != loss or loss in (float("inf"), float("-inf")):
                    raise DamagedError(
                        f"{options.load}: domain {name}: its loss is {loss}; the model's weights "
                        "hold values that are not finite, or --fp16 is too narrow for it"
                    )
                tokens = len(windows) * options.window_length
                found[name] = {"loss": loss, "windows": len(windows), "tokens": tokens}
                progress(1)
    losses = {name: row["loss"] for name, row in found.items()}
    return {
        "load": str(options.load),
        "parameters": axes.count_parameters(config),
        "loss": weighted_mean(losses, recipe.weights),
        "domains": found,
        "seq_length": options.window_length,
        "split": options.split,
        "seed": options.seed,
        "dtype": options.dtype,
    }
