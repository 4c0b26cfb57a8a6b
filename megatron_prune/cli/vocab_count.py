"""Count how often a corpus has each token of a tokenizer: what `vocab plan` chooses by.

Takes text (.txt, a document each), JSON lines (.jsonl, a document a line), both packed as .gz or
.zst or not, and Megatron's token files (.bin with .idx). The counts are those of encoding every
document whole. Counts of several machines are added up with --merge.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.cli.options import byte_bar, check_output_file, positive, show
from megatron_prune.errors import ConfigError
from megatron_prune.ranks import is_first_rank

if TYPE_CHECKING:
    from emb_pruner.counts import Counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="directory of a model, Megatron checkpoint, tokenizer.json, .model or .tiktoken file",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, nargs="+", metavar="FILE", help="the corpus")
    what.add_argument(
        "--merge", type=Path, nargs="+", metavar="NPZ", help="files of this command, to add up"
    )
    parser.add_argument(
        "--input-kind", choices=("txt", "jsonl", "bin"), help="of every --input; default: by name"
    )
    parser.add_argument(
        "--json-key", default="text", metavar="KEY", help="that holds the text (default: text)"
    )
    parser.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes (default: 1)"
    )
    parser.add_argument("--save", type=Path, required=True, metavar="NPZ", help="the counts")
    parser.add_argument("--overwrite", action="store_true", help="replace counts that are there")


def run(args: argparse.Namespace) -> None:
    """Count, or add up; only the first of torchrun's ranks, if there are several."""
    if not is_first_rank():
        return
    from emb_pruner.counts import load_counts, merge_counts, save_counts

    inputs = [args.tokenizer, *(args.input or []), *(args.merge or [])]
    check_output_file(args.save, overwrite=args.overwrite, inputs=inputs)
    start = time.monotonic()
    if args.input is not None:
        counts = _count(args)
    else:
        counts = merge_counts(args.merge)
        if args.tokenizer is not None:
            from emb_pruner.formats import open_vocabulary

            load_counts(args.merge[0], open_vocabulary(args.tokenizer).digest)
    save_counts(args.save, counts)
    show(_summary(args.save, counts, time.monotonic() - start))


def _count(args: argparse.Namespace) -> Counts:
    from emb_pruner.counting import TokenCounter, count_tokens
    from emb_pruner.reading import check_corpora

    if args.tokenizer is None:
        raise ConfigError("--tokenizer PATH is missing: whose tokens to count in --input")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are counted by --workers alone
    counter = TokenCounter(args.tokenizer, args.json_key)
    corpora = check_corpora(args.input, args.input_kind, counter.vocabulary.digest, counter.size)
    with byte_bar("count") as start:
        tell = start(sum(corpus.file_bytes for corpus in corpora))
        return count_tokens(counter, corpora, workers=args.workers, tell=tell)


def _summary(path: Path, counts: Counts, seconds: float) -> str:
    met = int((counts.counts_V > 0).sum())
    text = f", {counts.bytes} bytes of text" if counts.bytes else ""
    return (
        f"{path}: {counts.documents} documents{text}, {counts.tokens} tokens, {met} of "
        f"{counts.counts_V.size} ids met, {seconds:.1f} seconds"
    )
