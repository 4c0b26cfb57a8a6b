"""Training throughput at TP=1 against transformers' ``LlamaForCausalLM`` and ``torch.optim.AdamW``.

  python benchmarks/training.py --model runs/models/SmolLM2-135M-Instruct --data X_text_document

Both train the same model on sequences of the same length, one a step, with clipping, in the same
dtype and on the same threads, each in its own process, in turn. The figure is the median of the
steps after the first two. With ``--fused`` the baseline gets torch's fused AdamW as well, which is
what ours uses; by default it is AdamW as it comes. In bf16 the baseline's parameters are bf16 and
nothing else; ours has fp32 master weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 2


def ours(model: Path, data: Path, seq_length: int, steps: int, bf16: bool) -> float:
    """Seconds a step of ``megatron-prune train``."""
    save = Path(tempfile.mkdtemp(prefix="benchmark-"))
    flags = ["--micro-batch-size", 1, "--global-batch-size", 1, "--seq-length", seq_length]
    flags += ["--train-iters", steps, "--lr", "1e-5", "--lr-decay-style", "constant"]
    flags += ["--eval-iters", 0, "--log-interval", 1, "--save-interval", 10**6]
    words = ["train", "--load", model, "--save", save, "--data-path", data, "--split", "100,0,0"]
    words += [*flags, *(["--bf16"] if bf16 else [])]
    command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
        rows = map(json.loads, (save / "metrics.jsonl").read_text().splitlines())
        seconds = [row["seconds"] for row in rows if "lm loss" in row]
    finally:
        shutil.rmtree(save)
    return statistics.median(seconds[WARM_UP:])


def transformers_step_seconds(
    model: Path, data: Path, seq_length: int, steps: int, bf16: bool, fused: bool
) -> float:
    """Seconds a step of a plain loop; runs in this process."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if bf16 else torch.float32
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=fused or None)
    tokens = torch.from_numpy(np.fromfile(f"{data}.bin", np.uint16).astype(np.int64))
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        window = tokens[step * seq_length : (step + 1) * seq_length + 1][None]
        inputs, labels = window[:, :-1], window[:, 1:]
        optimizer.zero_grad()
        network(inputs, labels=labels, shift_labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--data", type=Path, required=True, help=".bin/.idx prefix, 16-bit ids")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--fused", action="store_true", help="fused AdamW for the baseline too")
    parser.add_argument("--baseline-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    work = (args.model, args.data, args.seq_length, args.steps, args.bf16)
    if args.baseline_only:
        print(transformers_step_seconds(*work, args.fused))
        return
    pairs = []
    for _ in range(args.repeats):
        again = [sys.executable, __file__, *sys.argv[1:], "--baseline-only"]
        told = subprocess.run(again, capture_output=True, text=True, check=True).stdout
        pairs.append((ours(*work), float(told.split()[-1])))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    print(f"{'bf16' if args.bf16 else 'fp32'}, {threads} threads, sequence {args.seq_length}")
    print("| | tokens/s |\n|---|---|")
    for name, which in (("megatron-prune train, TP=1", 0), ("transformers + AdamW", 1)):
        print(f"| {name} | {args.seq_length / statistics.median(p[which] for p in pairs):.0f} |")
    ratios = sorted(baseline / mine for mine, baseline in pairs)
    print(f"\nratio: {statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})")


if __name__ == "__main__":
    main()
