"""`vocab count` against encoding every document with `tokenizers`: megabytes a CPU second.

  python benchmarks/vocab_count.py --tokenizer runs/models/SmolLM2-135M-Instruct \\
      --input wikitext2.valid.txt books.jsonl

Both read the same files in turns, so that both meet the same machine; medians of --repeats. The
plain way reads the documents into memory and calls ``encode_batch_fast``; its counts are compared.
A text file is one document to both. With --workers the command's own time on the wall and the CPU
seconds of all its processes are given too, start-up included; a small corpus shows mostly that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import time
from itertools import chain
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tokenizers import Tokenizer

from emb_pruner.counting import TokenCounter, count_tokens
from emb_pruner.reading import check_corpora


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="with a tokenizer.json")
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=".txt and .jsonl")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    return parser.parse_args()


def documents_of(path: Path) -> list[str]:
    text = path.read_bytes().decode()
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in text.split("\n") if line.strip()]
    return [text]


def plainly(tokenizer: Tokenizer, path: Path, size: int) -> np.ndarray:
    found = tokenizer.encode_batch_fast(documents_of(path), add_special_tokens=False)
    return np.bincount(list(chain.from_iterable(x.ids for x in found)), minlength=size)


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(x.ru_utime + x.ru_stime for x in used)


def one_process(args: argparse.Namespace) -> None:
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    print("| text | MB | encode_batch, MB/s | vocab count, MB/s | ratio |")
    print("|---|---|---|---|---|")
    for path in args.input:
        plain, ours = [], []
        for _ in range(args.repeats):
            start = time.process_time()
            wanted = plainly(tokenizer, path, tokenizer.get_vocab_size())
            plain.append(time.process_time() - start)
            counter = TokenCounter(args.tokenizer, "text")  # a new one: nothing is known yet
            inputs = check_corpora([path], None, counter.vocabulary.digest, counter.vocabulary.size)
            start = time.process_time()
            counts = count_tokens(counter, inputs)
            ours.append(time.process_time() - start)
            assert (counts.counts_V == wanted).all(), path
        megabytes = counts.bytes / 1e6
        fast, slow = (megabytes / statistics.median(x) for x in (ours, plain))
        print(f"| {path.name} | {megabytes:.1f} | {slow:.2f} | {fast:.2f} | {fast / slow:.1f} |")


def several_processes(args: argparse.Namespace) -> None:
    counter = TokenCounter(args.tokenizer, "text")
    inputs = check_corpora(args.input, None, counter.vocabulary.digest, counter.vocabulary.size)
    print("\n| workers | MB | wall, s | MB/s | CPU, s | MB a CPU second |")
    print("|---|---|---|---|---|---|")
    for workers in args.workers:
        walls, cpus = [], []
        for _ in range(args.repeats):
            wall, cpu = time.monotonic(), cpu_seconds()
            megabytes = count_tokens(counter, inputs, workers=workers).bytes / 1e6
            walls.append(time.monotonic() - wall)
            cpus.append(cpu_seconds() - cpu)
            counter = TokenCounter(args.tokenizer, "text")
        seconds, used = statistics.median(walls), statistics.median(cpus)
        print(
            f"| {workers} | {megabytes:.1f} | {seconds:.2f} | {megabytes / seconds:.2f} | "
            f"{used:.2f} | {megabytes / used:.2f} |"
        )


if __name__ == "__main__":
    arguments = parse()
    one_process(arguments)
    several_processes(arguments)
