"""What a step with low-rank factors costs against one that trains everything: time and memory.

  python benchmarks/lora.py --model runs/models/SmolLM2-135M-Instruct --data X_text_document

Each variant trains the model at TP=1, one sequence a step, in a process of its own, in turn, for
``--rounds`` rounds. Told are the median CPU and clock seconds of the steps after the first, and the
largest resident memory of the process, of which about 0.5 GB are the libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 1


def measure(
    model: Path, data: Path, seq_length: int, steps: int, rank: int, bf16: bool, keep_zeros: bool
) -> dict[str, float]:
    """Runs in this process; rank 0 trains everything."""
    import torch

    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.train.inputs import open_inputs
    from megatron_prune.engine.train.loop import Training
    from megatron_prune.engine.train.options import TrainOptions
    from megatron_prune.engine.train.signals import StopSignals
    from megatron_prune.model.grid import ParallelGrid

    seconds: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        model_parallel(ParallelGrid()) as groups,
        StopSignals() as signals,
    ):
        options = TrainOptions(
            load=model,
            save=Path(folder) / "run",
            data_path=(str(data),),
            train_iters=steps,
            micro_batch_size=1,
            seq_length=seq_length,
            lr=1e-5,
            lr_decay_style="constant",
            eval_iters=0,
            split="100,0,0",
            dtype="bf16" if bf16 else "fp32",
            lora_rank=rank or None,
            lora_keep_zeros=keep_zeros,
        )
        training = Training(options, groups, open_inputs(options, groups))
        for _ in range(steps):
            clock, cpu = time.perf_counter(), time.process_time()
            training.step(signals)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append((time.process_time() - cpu, time.perf_counter() - clock))
    cpus, clocks = zip(*seconds[WARM_UP:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "cpu": statistics.median(cpus),
        "clock": statistics.median(clocks),
        "GB": (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help=".bin/.idx prefix")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    variants = {
        "everything": (0, False),
        "LoRA": (args.rank, False),
        "keep zeros": (args.rank, True),
    }
    if args.only:
        rank, zeros = variants[args.only]
        given = (args.model, args.data, args.seq_length, args.steps, rank, args.bf16, zeros)
        print(json.dumps(measure(*given)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name in variants:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    dtype = "bf16" if args.bf16 else "fp32"
    print(f"{dtype}, {threads} threads, sequence {args.seq_length}, rank {args.rank}")
    print("| trained | CPU s | clock s | GB |\n|---|---|---|---|")
    for name, runs in found.items():
        middle = {kind: statistics.median(run[kind] for run in runs) for kind in runs[0]}
        print(f"| {name} | {middle['cpu']:.2f} | {middle['clock']:.2f} | {middle['GB']:.2f} |")


if __name__ == "__main__":
    main()
