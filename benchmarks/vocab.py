"""Bits per byte of a model with a smaller vocabulary, before any training: how tokens are chosen.

  python benchmarks/vocab.py --model runs/models/SmolLM2-135M-Instruct \\
      --corpus web.jsonl code.jsonl --text wikitext2.valid.txt prose.eval.txt

``naive`` keeps the most frequent tokens and what is mandatory, without what they are merged from;
the others are the methods of `vocab plan`. All count the same corpus. The model is cut to the kept
rows and judged on the same bytes of each text, in windows of 1024 tokens that do not overlap; bits
per byte compare across vocabularies, losses do not.
"""

from __future__ import annotations

import argparse
import copy
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emb_pruner.counts import load_counts
from emb_pruner.forest import Forest
from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.formats.tokenizer_json import TokenizerJson
from emb_pruner.judging import dead_tokens, judge
from emb_pruner.selection import METHODS, PRIOR, select, with_prior
from emb_pruner.vocab_plan import VocabPlan

WINDOW = 1024


def naive(forest: Forest, counts_V: np.ndarray, size: int) -> tuple[int, ...]:
    """The most frequent tokens beside the mandatory ones, closed or not."""
    order = np.argsort(-with_prior(forest, counts_V, PRIOR), kind="stable").tolist()
    rest = [token for token in order if token not in forest.mandatory]
    return tuple(sorted([*forest.mandatory, *rest[: size - len(forest.mandatory)]]))


def written(vocabulary: TokenizerJson, plan: VocabPlan, folder: Path) -> Vocabulary:
    """The pruned tokenizer; what is not closed is written all the same, to be measured."""
    for name, content in vocabulary.files(plan).items():
        (folder / name).write_bytes(content)
    return open_vocabulary(folder)


@torch.inference_mode()
def bits_per_byte(model: Any, ids: list[int], size: int) -> float:
    """Of a text of ``size`` bytes; the first token of a window is given."""
    nats = 0.0
    for start in range(0, len(ids), WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        if window.shape[1] < 2:
            continue
        logits: Tensor = model(input_ids=window).logits[0, :-1].float()
        nats += float(nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return nats / math.log(2) / size


def cut(model: Any, kept: tuple[int, ...]) -> Any:
    """A copy with the kept rows of embedding and output layer."""
    small = copy.deepcopy(model)
    rows = torch.tensor(kept)
    for layer in {small.get_input_embeddings(), small.get_output_embeddings()}:
        layer.weight = nn.Parameter(layer.weight.detach().index_select(0, rows))
    small.tie_weights()
    return small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--corpus", type=Path, nargs="+", required=True, help="to count")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="to judge on")
    parser.add_argument("--size", type=int, nargs="+", default=[32768, 16384], help="tokens kept")
    parser.add_argument("--bytes", type=int, default=65536, help="of each text, judged")
    parser.add_argument("--prior", type=float, default=PRIOR, help="of `vocab plan`")
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM

    vocabulary = open_vocabulary(args.model)
    if not isinstance(vocabulary, TokenizerJson):
        raise SystemExit(f"--model {args.model}: wanted a directory with a tokenizer.json")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    texts = {
        path.name: path.read_bytes()[: args.bytes].decode(errors="ignore") for path in args.text
    }
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        counts = Path(name) / "counts.npz"
        words = ["vocab", "count", "--tokenizer", args.model, "--save", counts, "--input"]
        subprocess.run(
            [sys.executable, "-m", "megatron_prune", *map(str, [*words, *args.corpus])], check=True
        )
        counts_V = load_counts(counts, vocabulary.digest).counts_V
    began = time.perf_counter()
    forest = vocabulary.forest
    print(f"forest of {forest.size} tokens: {time.perf_counter() - began:.1f} s", file=sys.stderr)
    columns = " | ".join(f"{name}: bits/byte | tokens" for name in texts)
    print(f"| tokens | chosen by | dead | {columns} |\n|" + "---|" * (3 + 2 * len(texts)))
    for row in ("all", *args.size):
        for method in ("",) if row == "all" else ("naive", *METHODS):
            began = time.perf_counter()
            if row == "all":
                kept = tuple(range(forest.size))
            elif method == "naive":
                kept = naive(forest, counts_V, row)
            else:
                kept = select(forest, row, method=method, counts_V=counts_V, prior=args.prior)
            seconds = time.perf_counter() - began
            plan = VocabPlan(
                kept=kept,
                source_size=forest.size,
                tokenizer_digest=vocabulary.digest,
                method=method or "all",
            )
            with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
                pruned = written(vocabulary, plan, Path(name))
                small, cells = cut(model, kept), ""
                for text in texts.values():
                    (ids,) = pruned.encode([text])
                    found = bits_per_byte(small, ids, len(text.encode()))
                    fertility = judge(vocabulary, pruned, plan, [text]).fertility
                    cells += f" {found:.4f} | {fertility:.4f} |"
                dead = len(dead_tokens(vocabulary, pruned, plan))
            print(f"| {row} | {method} | {dead} |{cells}", flush=True)
            print(f"{row} {method}: chosen in {seconds:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
