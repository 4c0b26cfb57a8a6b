"""What a training run reads: where it starts, its model, its corpora, its teachers.

Opened and checked on all ranks before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.data.sidecar import CorpusFacts
from megatron_prune.engine.failures import on_first_rank, together
from megatron_prune.engine.forward.model import ModelOptions, check_model
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.teachers import (
    check_layers,
    check_projections,
    open_teachers,
    projected_layers,
)
from megatron_prune.engine.train.checkpoint import Start, find_start
from megatron_prune.engine.train.domains import check_data
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.engine.train.zeros import check_zeros
from megatron_prune.errors import ConfigError
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lora import Lora
from megatron_prune.shearing.words import MASKS
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source


@dataclass(frozen=True)
class RunInputs:
    """Everything a run reads, open; ``start`` says whether it continues."""

    start: Start
    source: Source
    facts: Sequence[CorpusFacts]
    teachers: Sequence[Source] = ()

    def close(self) -> None:
        for one in (self.source, *self.teachers):
            one.close()


def model_options(options: TrainOptions) -> ModelOptions:
    return ModelOptions(
        seq_length=options.seq_length,
        dtype=options.dtype,
        transformer_impl="local" if options.lora is not None else options.transformer_impl,
        sequence_parallel=options.sequence_parallel,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        lora=options.lora,
    )


def open_model(options: TrainOptions, start: Start, grid: ParallelGrid) -> Source:
    """The model a run starts from; refused when it cannot be trained, or not in this layout."""
    source = open_source(start.directory, family=options.family)
    source.config.shape.check_uniform("train", "prune without --nonuniform")
    grid.check(source.config.shape)
    check_model(source.config, model_options(options), grid.tensor_parallel)
    if start.state is not None:
        _check_same_lora(start.directory, source.lora, options.lora)
        if MASKS in start.state and not options.learns_masks:
            raise ConfigError(
                f"{start.directory}: is of a run of `shear`, whose masks would be lost; continue "
                "it with `shear`, or take its weights into a new run with --finetune"
            )
        if start.state.get("keep_zeros") and not options.keep_zeros:
            raise ConfigError(
                f"{start.directory}: was saved with --keep-zeros, which is missing; give it again, "
                "or --finetune from it into another --save, where its zeros may move"
            )
    return source


def _check_same_lora(directory: Path, found: Lora | None, wanted: Lora | None) -> None:
    """Refuse to continue with other factors than were saved: they are training state.

    Raises:
        ConfigError: with the flags of both.
    """
    if found != wanted:
        saved, now = ("no --lora-rank" if x is None else x.flags for x in (found, wanted))
        raise ConfigError(
            f"{directory}: was saved with {saved}, the flags say {now}; give the same flags, or "
            "--finetune from it into another --save, which starts from the merged weights"
        )


def _tokenizer_of(options: TrainOptions, source: Source, start: Start) -> Path | None:
    """Where the tokenizer lies that the corpora must have been made with; None when unknown."""
    if options.tokenizer_model is not None:
        return options.tokenizer_model
    return start.directory if any("token" in name for name in source.companion_files) else None


def open_corpora(options: TrainOptions, start: Start, source: Source) -> list[CorpusFacts]:
    """Every corpus of ``--data-path`` or ``--domains``; see `check_data`."""
    return check_data(options, start, _tokenizer_of(options, source, start), source.config)


def open_run_teachers(
    options: TrainOptions, start: Start, source: Source, grid: ParallelGrid
) -> list[Source]:
    """The teachers of the run, none without ``--teacher``; see `open_teachers`."""
    saved = [] if start.state is None else start.state.get("projections", [])
    if options.distill is None:
        check_projections(start.directory, saved, [])
        return []
    tokenizer, paths = _tokenizer_of(options, source, start), options.teacher
    run = model_options(options)
    teachers = open_teachers(paths, source, tokenizer, grid, run, options.family)
    pairs = options.hidden_layers
    check_layers(pairs, source, teachers[0])
    if start.state is not None:
        check_projections(start.directory, saved, projected_layers(pairs, source, teachers))
    return teachers


def open_inputs(options: TrainOptions, groups: Groups) -> RunInputs:
    """Open and check everything, the same on all ranks.

    Raises:
        PruneError: whatever a user has given and cannot be used.
    """
    ranks, grid = groups.ranks, groups.grid
    ranks.agree("the command line", repr(options))
    start = on_first_rank(ranks, lambda: find_start(options))
    source = together(ranks, lambda: open_model(options, start, grid))
    ranks.agree_on(f"the model in {source.path}", lambda: source.digest)
    if options.keep_zeros:
        on_first_rank(ranks, lambda: check_zeros(source))
    facts = on_first_rank(ranks, lambda: open_corpora(options, start, source))
    teachers = together(ranks, lambda: open_run_teachers(options, start, source, grid))
    return RunInputs(start, source, facts, teachers)
