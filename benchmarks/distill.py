"""What a teacher costs: a step with it against a step without and the teacher's forward pass.

  python benchmarks/distill.py --model runs/models/SmolLM2-135M-Instruct --data X_text_document

The student and the teacher are the same model, TP=1, in one process, on the same samples; each of
the three is timed in turn, microbatch by microbatch as `train` runs it. Printed is the median over
steps of (step with teacher) / (step without + teacher forward); wanted is at most 1.5. CPU seconds
of the process stand beside the clock's, which others on the machine slow down.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

WARM_UP = 1
WANTED = 1.5
TIMED = ("without", "teacher forward", "with")


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
    from megatron_prune.engine.run_inputs import open_inputs
    from megatron_prune.engine.signals import StopSignals
    from megatron_prune.engine.train import Training
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
        runs = [Training(one, groups, open_inputs(one, groups)) for one in (plain, taught)]
        distillation = runs[1].distillation
        assert distillation is not None
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in TIMED}

        def timed(name: str, work: Callable[[], object]) -> None:
            clock, cpu = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append((time.perf_counter() - clock, time.process_time() - cpu))

        tokens = torch.randint(100, (1, args.seq_length), device=groups.device)
        batch = (tokens, tokens, torch.ones_like(tokens))
        for _ in range(args.steps):
            timed("without", lambda: runs[0].step(signals))
            timed("teacher forward", lambda: list(distillation.beside(iter([batch]), 1, 1)))
            timed("with", lambda: runs[1].step(signals))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
    print(f"{plain.dtype}, {threads} threads, sequence {args.seq_length}, {groups.device.type}")
    print("| | clock (s) | CPU (s) |\n|---|---|---|")
    found = {name: list(zip(*values[WARM_UP:])) for name, values in seconds.items()}
    for name, kinds in found.items():
        print(f"| {name} | " + " | ".join(f"{statistics.median(k):.3f}" for k in kinds) + " |")
    for kind, name in enumerate(("clock", "CPU")):
        columns = (found[which][kind] for which in TIMED)
        ratios = sorted(w / (a + b) for a, b, w in zip(*columns))
        middle = statistics.median(ratios)
        print(f"{name} ratio: {middle:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}); wanted {WANTED}")


if __name__ == "__main__":
    main()
