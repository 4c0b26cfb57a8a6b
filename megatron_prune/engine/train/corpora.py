"""The samples of a run: Megatron's GPTDataset over .bin/.idx corpora, blended by weight.

Which sample comes when is a function of the prefixes, the weights, the split, the seed, the
sequence length and the total number of samples asked for (``--train-iters``), as in stock
Megatron-LM; a run that continues with the same flags continues the same order. Sample indices are
cached in a directory of our own, never beside the corpora.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_prune.data.sidecar import CorpusFacts, check_corpus
from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.errors import ConfigError

_SPLITS = ("training", "validation")


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Corpora and how often each is drawn from; the weights sum to 1."""

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


def parse_blend(words: Sequence[str]) -> Blend:
    """``w1 prefix1 w2 prefix2 ...`` or prefixes alone, as ``--data-path`` takes them.

    Raises:
        ConfigError: a weight that is not a positive number, or the sum of them is not.
    """
    if len(words) == 1:
        return Blend(prefixes=(words[0],), weights=None)
    numbers = [_number(word) for word in words[0::2]]
    if len(words) % 2 or any(number is None for number in numbers):
        if any(number is not None for number in numbers):
            raise ConfigError(
                f"--data-path {' '.join(words)}: wanted weight and prefix in turns, or prefixes "
                "alone"
            )
        return Blend(prefixes=tuple(words), weights=None)
    weights = [number for number in numbers if number is not None]
    if not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"--data-path {' '.join(words)}: every weight must be more than 0")
    total = sum(weights)
    return Blend(prefixes=tuple(words[1::2]), weights=tuple(weight / total for weight in weights))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


class _Tokenizer:
    """What GPTDataset asks of a tokenizer when the text is tokenised already."""

    pad = -1  # no token: nothing is masked
    unique_identifiers: dict[str, str]

    def __init__(self, vocab_size: int, eod: int | None) -> None:
        self.vocab_size, self.eod = vocab_size, -1 if eod is None else eod
        self.unique_identifiers = {"class": "megatron_prune"}


def check_split(split: str) -> list[tuple[float, float] | None]:
    """Megatron's ``--split``: shares of training, validation, test -> ranges, None for no share.

    Raises:
        ConfigError: not numbers, none positive, or none for training.
    """
    words = split.replace("/", ",").split(",")
    shares = [_number(word) for word in words]
    if not 1 <= len(words) <= 3 or any(s is None or not 0 <= s < float("inf") for s in shares):
        raise ConfigError(f"--split {split!r}; wanted up to three shares, such as 99,1,0")
    if not shares[0]:
        raise ConfigError(f"--split {split!r} leaves nothing to train on; wanted such as 99,1,0")
    ranges: list[tuple[float, float] | None] = convert_split_vector_to_split_matrix(
        parse_and_normalize_split(split)
    )
    return ranges


def check_corpora(
    options: TrainOptions, model_path: Path | None, vocab_size: int
) -> list[CorpusFacts]:
    """Look at every corpus before a weight is read: whole, of this tokenizer, long enough.

    Args:
        model_path: where the model's own tokenizer lies; None when it carries none.

    Raises:
        ConfigError, DamagedError: see `check_corpus`; or a split without a whole sample.
    """
    digest = load_tokenizer(model_path).digest if model_path is not None else None
    ranges = check_split(options.split)
    blend = parse_blend(options.data_path)
    facts = [check_corpus(prefix, digest, vocab_size) for prefix in blend.prefixes]
    if options.eod_mask_loss and facts[0].eod is None:
        raise ConfigError(f"--eod-mask-loss: {facts[0].prefix}.json does not tell the EOD token")
    wanted = options.seq_length + 1
    for fact in facts:
        index = IndexedDataset(fact.prefix)  # unmaps its lengths when it goes
        lengths = index.sequence_lengths
        for name, share in zip(_SPLITS, ranges):
            if share is None or (name == "validation" and not options.eval_iters):
                continue
            first, last = (round(edge * float(len(lengths))) for edge in share)
            tokens = int(np.sum(lengths[first:last], dtype=np.int64))
            if tokens < wanted:
                remedy = "; or --eval-iters 0" if name == "validation" else ""
                raise ConfigError(
                    f"{fact.prefix}: its {name} part under --split {options.split} is "
                    f"{last - first} documents of {tokens} tokens; one sample takes {wanted} "
                    f"(--seq-length + 1): give more text or another --split{remedy}"
                )
    if options.eval_iters and ranges[1] is None:
        raise ConfigError(
            f"--split {options.split} has no validation part; give it one, or --eval-iters 0"
        )
    return facts


def dataset_config(
    *,
    seed: int,
    seq_length: int,
    split: str,
    cache: Path,
    eod_mask_loss: bool,
    vocab_size: int,
    eod: int | None,
    blend: tuple[list[str], list[float] | None],
    surplus: float = 0.5,
) -> GPTDatasetConfig:
    """How Megatron cuts corpora into samples here."""
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend=blend,
        split=split,
        path_to_cache=str(cache),
        tokenizer=_Tokenizer(vocab_size, eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=eod_mask_loss,
        create_attention_mask=False,
        mid_level_dataset_surplus=surplus,
    )


def build_datasets(
    options: TrainOptions, facts: Sequence[CorpusFacts], samples: tuple[int, int], vocab_size: int
) -> tuple[Any, Any]:
    """Training and validation datasets of at least ``samples`` samples; None for no validation.

    Called on all ranks.
    """
    blend = parse_blend(options.data_path)
    weights = blend.weights
    if weights is None and len(facts) > 1:  # in proportion to their size, over as many epochs
        weights = tuple(fact.tokens / sum(f.tokens for f in facts) for fact in facts)
    config = dataset_config(
        seed=options.seed,
        seq_length=options.seq_length,
        split=options.split,
        cache=options.cache_path,
        eod_mask_loss=options.eod_mask_loss,
        vocab_size=vocab_size,
        eod=facts[0].eod,
        blend=(list(blend.prefixes), None if weights is None else list(weights)),
        # a surplus of half is enough for blends of any size; the default share only for large ones
        surplus=0.005 if samples[0] >= 10_000 else 0.5,
    )
    has_validation = samples[1] > 0
    config.split_matrix = [
        config.split_matrix[0],
        config.split_matrix[1] if has_validation else None,
        None,
    ]
    train, validation, _ = build_parts(config, [samples[0], samples[1], 0])
    return train, validation


def build_parts(config: GPTDatasetConfig, samples: list[int | None]) -> list[Any]:
    """Megatron's datasets of the three parts, without what it opens its cached indices with: numpy,
    allowed to unpickle. On all ranks: rank 0 writes the cache, the others read it.
    """
    original = np.load

    def load(file: Any, mmap_mode: Any = None, allow_pickle: bool = False) -> Any:
        return original(file, mmap_mode=mmap_mode, allow_pickle=False)

    np.load = load  # type: ignore[assignment]
    try:
        parts: list[Any] = BlendedMegatronDatasetBuilder(
            GPTDataset, samples, lambda: True, config
        ).build()
    finally:
        np.load = original
    return parts


def clean_cache(path: Path) -> None:
    """Remove cached indices that a kill has cut short, or that are pickles.

    Megatron takes an index for good when its files exist.
    """
    for file in sorted(path.glob("*_index.npy")):
        try:
            np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            print(f"{file}: not an index ({error}); built again", file=sys.stderr)
            file.unlink()
