"""From counts to a vocabulary plan: what has to stay, what is chosen, and why each token stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from emb_pruner.counts import load_counts
from emb_pruner.forest import Forest
from emb_pruner.formats import Vocabulary
from emb_pruner.remain_ids import closed_ids, read_ids
from emb_pruner.selection import PRIOR, select, with_prior
from emb_pruner.vocab_plan import VocabPlan
from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import np

ASKED = "asked for"


def make_vocab_plan(
    vocabulary: Vocabulary,
    size: int,
    *,
    counts: Path | None = None,
    method: str | None = None,
    prior: float | None = None,
    keep_file: Path | None = None,
    balance_for: int = 1,
) -> VocabPlan:
    """Choose ``size`` tokens.

    Args:
        counts: file of `vocab count` for this tokenizer; None: by the order of learning.
        keep_file: tokens that stay in any case, see `tokens_of`.

    Raises:
        ConfigError: see `load_counts`, `tokens_of` and `select`.
    """
    method = method or ("prefix" if counts is None else "leaf")
    prior = PRIOR if prior is None else prior
    if not 0 <= prior < float("inf"):
        raise ConfigError(f"--prior {prior:g}: wanted 0 or more")
    found = None if counts is None else load_counts(counts, vocabulary.digest).counts_V
    forest = vocabulary.forest
    if keep_file is not None:
        asked = dict.fromkeys(tokens_of(keep_file, vocabulary), ASKED)
        forest = replace(forest, mandatory={**asked, **forest.mandatory})
    kept = select(forest, size, method=method, counts_V=found, prior=prior)
    given = np.zeros(forest.size, dtype=np.int64) if found is None else found
    frequent = np.argsort(-with_prior(forest, given, prior), kind="stable")[:size]
    return VocabPlan(
        kept=kept,
        source_size=forest.size,
        tokenizer_digest=vocabulary.digest,
        method=method,
        balance_for=balance_for,
        reasons=_reasons(forest, kept, set(frequent.tolist()), "frequency"),
    )


def plan_of_ids(
    vocabulary: Vocabulary, path: Path, *, close: bool, balance_for: int = 1
) -> VocabPlan:
    """A plan that keeps the ids of a ``remain_vocab_ids.pt``.

    Of its reasons ``asked for`` are the ids given, ``closure`` what was added as parts of them.

    Args:
        close: add the tokens that have to stay with them.

    Raises:
        ConfigError, DamagedError: see `read_ids` and `closed_ids`.
    """
    ids = read_ids(path, vocabulary.size)
    kept = closed_ids(vocabulary, ids, close=close, where=str(path))
    return VocabPlan(
        kept=kept,
        source_size=vocabulary.size,
        tokenizer_digest=vocabulary.digest,
        method="ids",
        balance_for=balance_for,
        reasons=_reasons(vocabulary.forest, kept, set(ids), ASKED),
    )


def tokens_of(path: Path, vocabulary: Vocabulary) -> list[int]:
    """The tokens that a file names, one a line: as the tokenizer spells it, or text that is one.

    Raises:
        ConfigError: lines that are no token, all of them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"--keep-file {path}: not UTF-8 ({error.reason} at byte {error.start})"
        ) from None
    lines = [line for line in text.split("\n") if line]
    known = {vocabulary.token(token): token for token in range(vocabulary.forest.size)}
    found, missing = [], []
    for line, ids in zip(lines, vocabulary.encode(lines)):
        if line in known:
            found.append(known[line])
        elif len(ids) == 1:
            found.append(ids[0])
        else:
            missing.append(line)
    if missing:
        raise ConfigError(
            f"--keep-file {path}: {len(missing)} lines are no token of {vocabulary.path}: "
            f"{', '.join(map(repr, missing))}"
        )
    return found


def _reasons(forest: Forest, kept: tuple[int, ...], chosen: set[int], why: str) -> dict[str, int]:
    """How many tokens stay for which reason.

    Beside the mandatory ones: ``why`` are those chosen by themselves, ``closure`` the rest, which
    stay because others are merged from them.
    """
    found = Counter(
        forest.mandatory.get(token) or (why if token in chosen else "closure") for token in kept
    )
    return dict(sorted(found.items()))
