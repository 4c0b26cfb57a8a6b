"""What the scripts by the predecessor's names do: its options, `vocab count`, `plan` and `prune`.

Where it differs: a text file is one document and is not read line by line; the kept ids hold
special tokens, single bytes and parts of others, so that ``--remain_vocab_size`` is the size of the
new vocabulary; the model that is read does not change, the pruned one goes to ``--save``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from emb_pruner.counts import load_counts
from megatron_prune.cli import main
from megatron_prune.files import replace_file
from megatron_prune.model.lazy import np


def get_vocab_freq(doc: str | None, tokenizer: str, remain_vocab_size: int) -> int:
    """``get_vocab_freq.py``; returns the exit code.

    Args:
        tokenizer: the option that names it.
        remain_vocab_size: the default of the option.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument(
        "--data_type", choices=("txt", "mmap"), default="txt", help="mmap: .bin with .idx"
    )
    parser.add_argument("--data_path", required=True, help="the corpus; of mmap its prefix")
    parser.add_argument("--vocab_freq", default="vocab_freq", help="writes this .txt and .npz")
    parser.add_argument(tokenizer, dest="tokenizer", required=True, help="whose tokens to count")
    parser.add_argument("--model_name", help="not used, as before")
    parser.add_argument("--new_spm_path", help="not used, as before")
    parser.add_argument("--remain_vocab_size", type=int, default=remain_vocab_size)
    parser.add_argument("--remain_vocab_ids_path", default="remain_vocab_ids.pt")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    counts, named = f"{args.vocab_freq}.npz", ["--tokenizer", args.tokenizer]
    kind = {"txt": "txt", "mmap": "bin"}[args.data_type]
    count = ["count", *named, "--input", args.data_path, "--input-kind", kind, "--save", counts]
    if code := _vocab(*count, "--workers", args.workers, "--overwrite"):
        return code
    _write_frequencies(Path(f"{args.vocab_freq}.txt"), Path(counts))
    size = ["--vocab-size-remain", args.remain_vocab_size, "--any-size"]
    with tempfile.TemporaryDirectory() as folder:
        ids = ["--save-ids", args.remain_vocab_ids_path, "--save", f"{folder}/plan.json"]
        return _vocab("plan", *named, "--counts", counts, *size, *ids, "--overwrite")


def prune_tokenizer_and_emb(doc: str | None) -> int:
    """``prune_spm_and_emb.py`` and ``prune_tiktoken_and_emb.py``; returns the exit code."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--remain_vocab_path", default="remain_vocab_ids.pt")
    parser.add_argument("--hf_dir", required=True, help="the model, which does not change")
    parser.add_argument("--save", required=True, help="the pruned model, a new directory")
    parser.add_argument("--remain_ids_with_spt", help="writes the ids that were kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = f"{folder}/vocab_plan.json"
        ids = ["--keep-ids", args.remain_vocab_path, "--close", "--any-size"]
        if args.remain_ids_with_spt:
            ids += ["--save-ids", args.remain_ids_with_spt]
        planned = _vocab("plan", "--tokenizer", args.hf_dir, *ids, "--save", plan, "--overwrite")
        load = ["--load", args.hf_dir, "--plan", plan]
        return planned or _vocab("prune", *load, "--save", args.save, "--to", "hf")


def _vocab(*words: object) -> int:
    argv = ["vocab", *map(str, words)]
    print(f"   $ megatron-prune {' '.join(argv)}", file=sys.stderr)
    return main(argv)


def _write_frequencies(path: Path, counts: Path) -> None:
    """``id count`` lines, the most frequent first."""
    counts_V = load_counts(counts).counts_V
    order: Sequence[int] = np.argsort(-counts_V, kind="stable").tolist()
    lines = "".join(f"{token} {counts_V[token]}{os.linesep}" for token in order)
    replace_file(path, lines.encode())
