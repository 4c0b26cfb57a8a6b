"""Count how often a corpus has each token of a tokenizer: what `vocab plan` chooses by.

  megatron-prune vocab count --tokenizer llama --input corpus.jsonl --save counts.npz

The command takes text (.txt, a document each), JSON lines (.jsonl, a document a line), both packed
as .gz or .zst or not, and Megatron's token files (.bin with .idx). The counts are those of encoding
every document whole. Counts of several machines are added up with --merge.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag, positive
from megatron_prune.ranks import is_first_rank
from megatron_prune.stages.common import check_output_file, give_one
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.vocabulary import tell_tokens_beyond

if TYPE_CHECKING:
    from emb_pruner.counts import Counts


@dataclass(frozen=True, kw_only=True)
class VocabCountOptions:
    tokenizer: Path | None = flag(
        "directory of a model, Megatron checkpoint, tokenizer.json, .model or .tiktoken file",
        default=None,
        metavar="PATH",
    )
    input: tuple[Path, ...] = flag("the corpus; or --merge", default=(), metavar="FILE")
    merge: tuple[Path, ...] = flag("files of this command, to add up", default=(), metavar="NPZ")
    input_kind: str | None = flag(
        "of every --input (default: by name)", default=None, choices=("txt", "jsonl", "bin")
    )
    json_key: str = flag("that holds the text", default="text", metavar="KEY")
    workers: int = flag("processes", default=1, metavar="N", parse=positive)
    save: Path = flag("the counts", metavar="NPZ")
    overwrite: bool = flag("replace counts that are there", default=False)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Counts that were written.

    Attributes:
        met: ids that the corpus has at all.
    """

    path: Path
    documents: int
    bytes: int
    tokens: int
    met: int
    vocab_size: int
    seconds: float

    def __str__(self) -> str:
        text = f", {self.bytes} bytes of text" if self.bytes else ""
        return (
            f"{self.path}: {self.documents} documents{text}, {self.tokens} tokens, {self.met} of "
            f"{self.vocab_size} ids met, {self.seconds:.1f} seconds"
        )


def vocab_count(options: VocabCountOptions, console: Console = SILENT) -> Counted | None:
    """Count, or add up; only the first of torchrun's ranks, if there are several.

    Raises:
        ConfigError: neither a corpus nor counts to add up, or both; a tokenizer, a corpus or a
            target that cannot be used.
    """
    if not is_first_rank():
        return None
    from emb_pruner.counts import load_counts, merge_counts, save_counts

    give_one(options, "input", "merge")
    inputs = [options.tokenizer, *options.input, *options.merge]
    check_output_file(options.save, overwrite=options.overwrite, inputs=inputs)
    start = time.monotonic()
    if options.input:
        counts = _count(options, console)
    else:
        counts = merge_counts(options.merge)
        if options.tokenizer is not None:
            from emb_pruner.formats import open_vocabulary

            load_counts(options.merge[0], open_vocabulary(options.tokenizer).digest)
    save_counts(options.save, counts)
    return Counted(
        path=options.save,
        documents=counts.documents,
        bytes=counts.bytes,
        tokens=counts.tokens,
        met=int((counts.counts_V > 0).sum()),
        vocab_size=counts.counts_V.size,
        seconds=time.monotonic() - start,
    )


def _count(options: VocabCountOptions, console: Console) -> Counts:
    from emb_pruner.counting import TokenCounter, count_tokens
    from emb_pruner.reading import check_corpora

    if options.tokenizer is None:
        raise ConfigError("--tokenizer PATH is missing: whose tokens to count in --input")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are counted by --workers alone
    counter = TokenCounter(options.tokenizer, options.json_key)
    tell_tokens_beyond(counter.vocabulary, options.tokenizer, console)
    corpora = check_corpora(
        options.input, options.input_kind, counter.vocabulary.digest, counter.vocabulary.size
    )
    with console.bar("count", unit="B") as start:
        tell = start(sum(corpus.file_bytes for corpus in corpora))
        return count_tokens(counter, corpora, workers=options.workers, tell=tell)
