"""What a teacher costs: a step with it against a step without and the teacher's forward pass.

  python benchmarks/distill.py --model runs/models/SmolLM2-135M-Instruct --data X_text_document

The student and the teacher are the same model, TP=1, in one process, on the same samples; each of
the three is timed in turn, microbatch by microbatch as `train` runs it. Printed is the median over
steps of (step with teacher) / (step without + teacher forward); wanted is at most 1.5.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

WARM_UP = 1
WANTED = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="student and teacher")
    parser.add_argument("--data", type=Path, required=True, help=".bin/.idx prefix")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    from megatron_prune.engine.distill_options import DistillOptions
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.options import TrainOptions
    from megatron_prune.engine.signals import StopSignals
    from megatron_prune.engine.train import Training, open_run_teachers, open_start
    from megatron_prune.grid import ParallelGrid

    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        model_parallel(ParallelGrid()) as groups,
        StopSignals() as signals,
    ):
        plain = TrainOptions(
            load=args.model,
            save=Path(folder) / "run",
            data_path=(str(args.data),),
            train_iters=args.steps,
            micro_batch_size=1,
            seq_length=args.seq_length,
            lr=1e-5,
            lr_decay_style="constant",
            eval_iters=0,
            split="100,0,0",
            dtype="bf16" if args.bf16 else "fp32",
        )
        taught = dataclasses.replace(
            plain,
            distill=DistillOptions(
                teachers=(args.model,), top_k=args.top_k, temperature=args.temperature
            ),
        )
        runs = []
        for options in (plain, taught):
            start, source, facts = open_start(options, groups)
            teachers = open_run_teachers(options, start, source, groups.grid)
            runs.append(Training(options, groups, start, source, facts, teachers))
        distillation = runs[1].distillation
        assert distillation is not None
        seconds: dict[str, list[float]] = {"without": [], "teacher forward": [], "with": []}

        def timed(name: str, work: object) -> None:
            began = time.perf_counter()
            work()  # type: ignore[operator]
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)

        tokens = torch.randint(100, (1, args.seq_length), device=groups.device)
        batch = (tokens, tokens, torch.ones_like(tokens))
        for _ in range(args.steps):
            timed("without", lambda: runs[0].step(signals))
            timed("teacher forward", lambda: list(distillation.beside(iter([batch]), 1, 1)))
            timed("with", lambda: runs[1].step(signals))
    found = {name: values[WARM_UP:] for name, values in seconds.items()}
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    print(f"{plain.dtype}, {threads} threads, sequence {args.seq_length}, {groups.device.type}")
    print("| | seconds |\n|---|---|")
    for name, values in found.items():
        print(f"| {name} | {statistics.median(values):.3f} |")
    ratios = sorted(w / (a + b) for a, b, w in zip(*found.values()))
    middle = statistics.median(ratios)
    print(f"\nratio: {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); wanted {WANTED} or less")


if __name__ == "__main__":
    main()
