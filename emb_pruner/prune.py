"""A model cut to the tokens of a plan: rows, tokenizer files and the ids in its configuration.

The rows are axis V of a `PrunePlan`, which `pruned.PrunedSource` cuts as it does every other axis,
alone or together with them. Here is what else has to follow: `VocabularySource` puts the pruned
tokenizer's files and renumbered configurations in the place of the source's, so whatever writes a
source writes them together.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from emb_pruner.config_ids import renumber, renumber_config
from emb_pruner.formats import Vocabulary
from emb_pruner.formats.companions import SENTENCEPIECE
from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.data.tokenizers import tokenizer_directory
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.families.config import CONFIG
from megatron_prune.files.parsing import read_table
from megatron_prune.planning.plan import Kept, PrunePlan
from megatron_prune.sources.source import SPARSITY, VOCAB_PLAN, DerivedSource, Source

GENERATION_CONFIG = "generation_config.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt",
)  # fmt: skip
_TOKENIZER_SUFFIXES = (".tiktoken",)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file beside a model says which token has which id."""
    listed = name in _TOKENIZER_FILES or name.endswith(_TOKENIZER_SUFFIXES)
    return listed or SENTENCEPIECE.search(name) is not None


def check_vocab_plan(plan: VocabPlan, vocabulary: Vocabulary, source: Source) -> None:
    """Refuse a plan for another tokenizer, or a model without rows for it.

    Raises:
        PlanError: with both sides.
    """
    if plan.tokenizer_digest != vocabulary.digest:
        raise PlanError(
            f"{vocabulary.path}: its tokenizer's digest is {vocabulary.digest[:12]}..., the plan "
            f"was made for {plan.tokenizer_digest[:12]}... ({plan.source_size} tokens); make a "
            "plan for this tokenizer"
        )
    tokens_beyond(vocabulary, source.config.shape.vocab_size, source.path)


def tokens_beyond(vocabulary: Vocabulary, rows: int, where: Path) -> list[int]:
    """Added tokens that a model has no rows for, such as a ``[PAD]`` that nobody made room for.

    They stay in the tokenizer, behind all others and without a row, as they were.

    Args:
        rows: of the model at ``where``.

    Raises:
        PlanError: tokens that were not added have no rows either.
    """
    if vocabulary.size <= rows:
        return []
    known = vocabulary.forest.mandatory
    beyond = [id for id in range(rows, vocabulary.size) if vocabulary.token(id)]
    if any(known.get(id) not in ("special", "added") for id in beyond):
        raise PlanError(
            f"{where}: has rows for {rows} tokens, the tokenizer of {vocabulary.path} has "
            f"{vocabulary.size}; this tokenizer is not the model's"
        )
    return beyond


def rows_beside(tokenizer: Path) -> tuple[Path, int] | None:
    """The config.json beside a tokenizer, and the model's rows by it; None where nothing tells."""
    path = tokenizer_directory(tokenizer) / CONFIG if tokenizer.is_dir() else None
    if path is None or not path.is_file():
        return None
    rows = read_table(path, ConfigError, "not a model configuration").get("vocab_size")
    return (path, rows) if type(rows) is int else None


def vocabulary_axis(plan: VocabPlan, source: Source, base: PrunePlan | None = None) -> PrunePlan:
    """The plan that cuts the model's rows to the kept tokens, beside what ``base`` cuts.

    Rows beyond the tokenizer's tokens go; `tokens_beyond` the rows have none. Kept rows lie on
    whatever rank they come to.

    Raises:
        PlanError: ``base`` decides about the vocabulary already.
    """
    kept = tuple(id for id in plan.kept if id < source.config.shape.vocab_size)
    if base is not None:
        if base.kept.vocab is not None:
            raise PlanError(
                "the plan keeps a vocabulary of its own (kept.vocab) and another is given with "
                "--vocab-plan; leave one out"
            )
        return replace(base, kept=replace(base.kept, vocab=kept))
    return PrunePlan(
        source=source.config.shape,
        kept=Kept(vocab=kept),
        criterion=plan.method,
        seed=0,
        prune_type="unbalance",
        balance_for=1,
        source_digest=source.digest,
    )


def vocab_plan_of(plan: PrunePlan, vocabulary: Vocabulary) -> VocabPlan:
    """What a plan with an axis V keeps of the model's tokenizer.

    Raises:
        PlanError: it keeps rows that no token of the tokenizer has.
    """
    kept, size = plan.kept.vocab, vocabulary.forest.size
    assert kept is not None
    if kept[-1] >= size:
        raise PlanError(
            f"kept.vocab: holds {kept[-1]}; the tokenizer of {vocabulary.path} has {size} tokens, "
            "further rows are padding; keep tokens only"
        )
    rows = plan.source.vocab_size
    return VocabPlan(
        kept=(*kept, *(id for id in range(rows, size) if vocabulary.token(id))),
        source_size=size,
        tokenizer_digest=vocabulary.digest,
        method=plan.criterion,
    )


def write_companions(
    plan: VocabPlan, vocabulary: Vocabulary, source: Source, directory: Path
) -> dict[str, Path]:
    """What is to lie beside the pruned model's weights, by name.

    The tokenizer's files, the generation config and the plan are written into ``directory``;
    what does not speak of tokens stays the source's.

    Raises:
        PlanError: the plan is not closed, or drops a token that the generation config needs.
        ConfigError: a generation config that cannot be read.
    """
    written = vocabulary.write(plan, directory)
    (directory / VOCAB_PLAN).write_text(plan.to_json())
    path = source.companion_files.get(GENERATION_CONFIG)
    if path is not None:
        values = renumber(read_table(path, ConfigError, "not a generation config"), plan, str(path))
        (directory / GENERATION_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
        written = [*written, GENERATION_CONFIG]
    kept = {
        name: path
        for name, path in source.companion_files.items()
        if not is_tokenizer_file(name) and name != SPARSITY  # of the whole model
    }
    return kept | {name: directory / name for name in (*written, VOCAB_PLAN)}


class VocabularySource(DerivedSource):
    """A model pruned along axis V, its companions and the ids in its configuration with it.

    Args:
        pruned: rows of the kept tokens only; companions and configuration of the whole model.
        companion_files: from `write_companions`.

    Raises:
        PlanError: the configuration needs a token that the plan drops.
        ConfigError: it names what is no token.
    """

    def __init__(
        self, pruned: Source, plan: VocabPlan, companion_files: Mapping[str, Path]
    ) -> None:
        super().__init__(pruned)
        self.companion_files = dict(companion_files)
        values = renumber_config(pruned.config.hf_config, plan, str(pruned.path / CONFIG))
        self.config = replace(pruned.config, hf_config=values)
