"""Teachers of a run: opened and checked before a weight is read, and their models.

A teacher may differ from the student in every width and in depth, lie in any format and be sharded
in any way; it is loaded at the student's TP and PP, with stages of its own. Its tokens must be the
student's: where the student's plan keeps a part of a vocabulary, the teacher takes part with the
rows of those tokens alone (`PrunedSource`), which is the whole teacher restricted to them and
renormalised; it reads the text in the student's tokens, too. Any other vocabulary is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.engine.failures import together
from megatron_prune.engine.forward.model import (
    LanguageModel,
    ModelOptions,
    build_model,
    check_model,
)
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import ConfigError, PruneError
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.planning.plan import Kept, PrunePlan, load_plan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import VOCAB_PLAN, Source
from megatron_prune.store import open_source


def open_teachers(
    paths: Sequence[Path],
    student: Source,
    tokenizer: Path | None,
    grid: ParallelGrid,
    options: ModelOptions,
    family: str | None = None,
) -> list[Source]:
    """The teachers, in the student's vocabulary; no weight is read whole.

    Args:
        tokenizer: where the student's tokenizer lies; None when unknown.

    Raises:
        CheckpointError: nothing there that we read.
        ConfigError: another vocabulary or tokenizer, or a model the engine cannot run.
        ShapeError: it does not divide by the layout.
    """
    found = []
    for path in paths:
        source = open_source(path, family=family)
        try:
            stage_grid = grid.for_layers(source.config.shape.num_layers)
            stage_grid.check(source.config.shape)
            check_model(source.config, options, grid.tensor_parallel)
        except PruneError as error:
            raise type(error)(f"--teacher {path}: {error}") from error
        found.append(_in_vocabulary(source, student, tokenizer))
    return found


def _in_vocabulary(teacher: Source, student: Source, tokenizer: Path | None) -> Source:
    """The teacher in the student's vocabulary."""
    theirs, ours = teacher.config.shape.vocab_size, student.config.shape.vocab_size
    has_tokenizer = any("token" in name for name in teacher.companion_files)
    known = has_tokenizer and tokenizer is not None
    if theirs == ours:
        if known and load_tokenizer(teacher.path).digest != load_tokenizer(tokenizer or "").digest:
            raise ConfigError(
                f"--teacher {teacher.path}: its tokenizer is not the student's ({tokenizer}), "
                f"though both have {ours} ids; teach with a model of the same tokenizer"
            )
        return teacher
    kept = _kept_tokens(student, theirs)
    if kept is None:
        raise ConfigError(
            f"--teacher {teacher.path}: has a vocabulary of {theirs} tokens, the student one of "
            f"{ours}, and neither the student's plan.json (kept.vocab) nor its {VOCAB_PLAN} tells "
            "which of them are which; teach with a model of the student's vocabulary, or of the "
            "one that it was cut from"
        )
    if known:
        _check_kept(teacher, kept, tokenizer or Path())
    vocabulary = PrunePlan(
        source=teacher.config.shape,
        kept=Kept(vocab=kept),
        criterion="vocabulary of the student",
        seed=0,
        prune_type="unbalance",
        balance_for=1,
        source_digest=teacher.digest,
    )
    return PrunedSource(teacher, vocabulary)


def _kept_tokens(student: Source, theirs: int) -> tuple[int, ...] | None:
    """The student's tokens in the numbers of the vocabulary it was cut from, if that is one of
    ``theirs`` rows, padding included; None when nothing tells.

    A student whose vocabulary was cut first and whose widths later has them in the plan that
    travels with its tokenizer.
    """
    from emb_pruner.vocab_plan import load_vocab_plan

    ours = student.config.shape.vocab_size
    plan = None if student.plan_path is None else load_plan(student.plan_path)
    kept = None if plan is None else plan.kept.vocab
    if plan is not None and plan.source.vocab_size == theirs and kept and len(kept) == ours:
        return kept
    if VOCAB_PLAN not in student.companion_files:
        return None
    vocab_plan = load_vocab_plan(student.companion_files[VOCAB_PLAN])
    fits = vocab_plan.size == ours and vocab_plan.source_size <= theirs
    return vocab_plan.kept if fits else None


def _check_kept(teacher: Source, kept: Sequence[int], tokenizer: Path) -> None:
    """Every token of the student is the teacher's at the place that the plan says."""
    theirs = load_tokenizer(teacher.path).vocab()
    for token, number in load_tokenizer(tokenizer).vocab().items():
        if number < len(kept) and theirs.get(token) != kept[number]:
            raise ConfigError(
                f"--teacher {teacher.path}: the student's token {number} is {token!r}, which its "
                f"plan takes from {kept[number]}; the teacher has it at {theirs.get(token)}: "
                "teach with a model of the tokenizer that the plan was made for"
            )


def check_layers(pairs: Sequence[tuple[int, int]], student: Source, teacher: Source) -> None:
    """Refuse a layer map that names layers which are not there.

    Raises:
        ConfigError: with the pair and the number of layers.
    """
    depths = student.config.shape.num_layers, teacher.config.shape.num_layers
    for pair in pairs:
        if pair[0] >= depths[0] or pair[1] >= depths[1]:
            raise ConfigError(
                f"--distill-hidden-layers {pair[0]}:{pair[1]}: the student's layers are 0 to "
                f"{depths[0] - 1}, the teacher's 0 to {depths[1] - 1}"
            )


def projected_layers(
    pairs: Sequence[tuple[int, int]], student: Source, teachers: Sequence[Source]
) -> list[list[int]]:
    """The pairs of layers that are compared through a learned projection: all, or none."""
    widths = {source.config.shape.hidden_size for source in (student, *teachers)}
    return [list(pair) for pair in pairs] if len(widths) > 1 else []


def check_projections(directory: Path, found: list[list[int]], wanted: list[list[int]]) -> None:
    """Refuse to continue with other projections than were saved: they are training state.

    Raises:
        ConfigError: with both layer maps.
    """

    def flag(pairs: list[list[int]]) -> str:
        told = ",".join(f"{student}:{teacher}" for student, teacher in pairs)
        return f"--distill-hidden-layers {told}" if told else "no --distill-hidden-layers"

    if found != wanted:
        raise ConfigError(
            f"{directory}: was saved with the projections of {flag(found)}, the flags say "
            f"{flag(wanted)}; give the same flags, or --finetune from it into another --save"
        )


def load_teacher(source: Source, groups: Groups, options: ModelOptions) -> LanguageModel:
    """This rank's part of a teacher: the run's dtype, no gradients, evaluation mode.

    Memory: its weights once, 2 bytes a parameter in bf16 or fp16 and 4 in fp32, over TP x PP.
    """
    grid = groups.grid.for_layers(source.config.shape.num_layers)
    own = replace(groups, grid=grid)
    plain = replace(
        options,
        recompute_granularity=None,
        recompute_method=None,
        recompute_num_layers=None,
        lora=None,
    )
    model = build_model(source.config, own, plain)
    load_weights(model, source, own)
    together(groups.ranks, source.close)
    return model.requires_grad_(False).eval()
