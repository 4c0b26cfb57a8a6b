"""Pruning along the vocabulary: its flags, and what follows the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError
from megatron_prune.flags import Group, flag
from megatron_prune.model.grid import VOCAB_DIVISOR, padded_vocab_size
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.source import Source
from megatron_prune.stages.console import Console
from megatron_prune.surgery import Target

if TYPE_CHECKING:
    from emb_pruner.formats import Vocabulary


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A plan, and what to do with a model pruned by it so that its tokenizer follows its rows."""

    plan: PrunePlan
    companions: Callable[[Source], Source] = lambda pruned: pruned


_TOLD = 4  # tokens that a warning names
VOCABULARY = Group("vocabulary, in the same pass")


@dataclass(frozen=True, kw_only=True)
class VocabularyFlags:
    """Of a stage that prunes the vocabulary on the way."""

    vocab_plan: Path | None = flag(
        "of `megatron-prune vocab plan`", default=None, metavar="PLAN", group=VOCABULARY
    )
    vocab_tokenizer: Path | None = flag(
        "of a source that carries none", default=None, metavar="PATH", group=VOCABULARY
    )


@contextmanager
def cut_vocabulary(
    vocab_plan: Path | None, tokenizer: Path | None, source: Source, plan: PrunePlan | None
) -> Iterator[Cut]:
    """What is to be cut, and the pruned tokenizer's files for the time of the block.

    Args:
        vocab_plan: a file of `emb_pruner.vocab_plan`; without one the axis V of ``plan`` counts.
        tokenizer: None for the source's own.

    Raises:
        PlanError, ConfigError: another tokenizer or model, tokens that have to stay.
    """
    if vocab_plan is not None or (plan is not None and plan.kept.vocab is not None):
        with TemporaryDirectory() as scratch:
            yield _cut(vocab_plan, tokenizer, source, plan, Path(scratch))
        return
    if tokenizer is not None:
        raise ConfigError("--vocab-tokenizer: no plan drops tokens, so nothing would use it")
    assert plan is not None
    yield Cut(plan=plan)


def _cut(
    vocab_plan: Path | None,
    tokenizer: Path | None,
    source: Source,
    plan: PrunePlan | None,
    directory: Path,
) -> Cut:
    from emb_pruner.prune import (
        VocabularySource,
        check_vocab_plan,
        vocab_plan_of,
        vocabulary_axis,
        write_companions,
    )
    from emb_pruner.vocab_plan import load_vocab_plan

    decided = None if vocab_plan is None else load_vocab_plan(vocab_plan)
    vocabulary = _open_vocabulary(tokenizer, source)
    if decided is None:
        assert plan is not None
        decided = vocab_plan_of(plan, vocabulary)
        check_vocab_plan(decided, vocabulary, source)
    else:
        check_vocab_plan(decided, vocabulary, source)
        plan = vocabulary_axis(decided, source, plan)
    files = write_companions(decided, vocabulary, source, directory)
    return Cut(plan=plan, companions=lambda pruned: VocabularySource(pruned, decided, files))


def _open_vocabulary(tokenizer: Path | None, source: Source) -> Vocabulary:
    """The source's own tokenizer, or where it carries none the one that is named; refuses to be
    given another than the source's."""
    from emb_pruner.formats import open_vocabulary
    from emb_pruner.prune import is_tokenizer_file

    carries = any(is_tokenizer_file(name) for name in source.companion_files)
    if not carries and tokenizer is None:
        raise ConfigError(
            f"{source.path}: carries no tokenizer to cut; name the model's with --vocab-tokenizer"
        )
    named = None if tokenizer is None else open_vocabulary(tokenizer)
    own = open_vocabulary(source.path) if carries else named
    assert own is not None
    if named is not None and own.digest != named.digest:
        raise ConfigError(
            f"--vocab-tokenizer {tokenizer}: its digest is {named.digest[:12]}..., that of the "
            f"model's own in {source.path} is {own.digest[:12]}...; leave the flag out"
        )
    return own


def tell_tokens_beyond(vocabulary: Vocabulary, path: Path, console: Console) -> int:
    """How many tokens have no row by the config.json beside a tokenizer; says which.

    Raises:
        PlanError: the tokenizer is another model's.
    """
    from emb_pruner.prune import rows_beside, tokens_beyond

    if (told := rows_beside(path)) is None:
        return 0
    config, rows = told
    if beyond := tokens_beyond(vocabulary, rows, config):
        named = ", ".join(f"{vocabulary.token(id)!r} ({id})" for id in beyond[:_TOLD])
        more = f" and {len(beyond) - _TOLD} more" if len(beyond) > _TOLD else ""
        console.say(
            f"warning: {config}: has rows for {rows} tokens and none for {named}{more}; they stay "
            "tokens without a row, behind those that are kept"
        )
    return len(beyond)


def tell_padding(plan: PrunePlan, target: Target, console: Console) -> None:
    """Say so where the kept tokens do not divide over the target's ranks as Megatron wants them."""
    parts = target.grid.tensor_parallel
    size, padded = plan.target.vocab_size, padded_vocab_size(plan.target.vocab_size, parts)
    if plan.kept.vocab is not None and target.format != "hf" and padded != size:
        console.say(
            f"{size} tokens are padded to {padded} rows at TP={parts}; a multiple of "
            f"{VOCAB_DIVISOR * parts} needs no padding"
        )
