"""What a step costs with a teacher, with domains and while a checkpoint is written.

  python benchmarks/step_time.py --model runs/models/SmolLM2-135M-Instruct \\
      --data CODE_text_document PROSE_text_document

The same model trains three times in one process at TP=1: plainly, with itself as teacher, and on
one domain a corpus; steps are taken in turn, so that the machine is the same to all. Printed are
medians over steps, and medians of (step with teacher) / (step without + teacher forward), wanted at
most 1.5, and of (step on domains) / (step without), wanted below 1.01 and lost in the noise of
whole steps, so the time of drawing samples stands beside it. Then what training stands still for
when it saves, with and without ``--async-save``. CPU seconds of the process stand beside the
clock's, which others on the machine slow down.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

WARM_UP = 1
SAMPLES = 1024  # drawn at a time, as `train` locates them

Times = dict[str, list[tuple[float, float]]]


def timed(into: Times, name: str, work: Callable[[], object]) -> None:
    """Clock and CPU seconds of one call."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    into.setdefault(name, []).append((time.perf_counter() - clock, time.process_time() - cpu))


def show(times: Times) -> None:
    print("\n| | clock (s) | CPU (s) |\n|---|---|---|")
    for name, values in times.items():
        middle = (statistics.median(column) for column in zip(*values[WARM_UP:]))
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in middle) + " |")


def show_ratio(times: Times, above: str, below: Sequence[str]) -> None:
    for kind, clock in enumerate(("clock", "CPU")):
        rows = zip(*(times[name][WARM_UP:] for name in (above, *below)))
        ratios = sorted(row[0][kind] / sum(part[kind] for part in row[1:]) for row in rows)
        middle = statistics.median(ratios)
        print(f"{above} / ({' + '.join(below)}), {clock}: {middle:.3f} "
              f"({ratios[0]:.3f} to {ratios[-1]:.3f})")  # fmt: skip


def drawing(run: Any, samples: int) -> float:
    """Seconds to draw a sample from a run's corpora, as `train` does."""
    began = time.perf_counter()
    for index in range(samples):
        run.samples.train[index]
    return (time.perf_counter() - began) / samples


def saves(run: Any, signals: Any, count: int) -> None:
    """Save, train on meanwhile, and tell what training stood still for."""
    from megatron_prune.engine.train.saving import Saver

    for is_async in (False, True):
        options = dataclasses.replace(run.options, async_save=is_async)
        run.saver = Saver(options, run.groups, run.passenger, say=lambda text: None)
        for _ in range(count):
            times: Times = {}
            timed(times, "stall", run.begin_save)
            while is_async and run.saver.is_writing:
                timed(times, "step", lambda: run.step(signals))
            timed(times, "stall", run.saver.finish)
            stalled = sum(clock for clock, _ in times["stall"])
            steps = [clock for clock, _ in times.get("step", [])]
            beside = f", {len(steps)} steps of {statistics.median(steps):.2f} s" if steps else ""
            how = "--async-save" if is_async else "without"
            print(f"save {how}: training stands still for {stalled:.2f} s{beside}")
            run.step(signals)


def kinds_of_runs(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What sets the runs apart: options of `train` by the name they are shown under."""
    from megatron_prune.engine.train.options import TrainOptions

    recipe = folder / "domains.yaml"
    domains = [
        {"name": p.name, "prefixes": [str(p.resolve())], "weight": 1, "target": 1.0}
        for p in args.data
    ]
    recipe.write_text(yaml.safe_dump({"domains": domains}))
    plain = TrainOptions(
        load=args.model,
        save=folder / "run",
        data_path=tuple(word for path in args.data for word in ("1", str(path))),
        train_iters=SAMPLES,
        micro_batch_size=1,
        seq_length=args.seq_length,
        lr=1e-5,
        lr_decay_style="constant",
        eval_iters=1,
        split="95,5,0",
        dtype="bf16" if args.bf16 else "fp32",
    )
    teacher = {
        "teacher": (args.model,),
        "distill_top_k": args.top_k,
        "distill_temperature": args.temperature,
    }
    return {
        "without": plain,
        "with teacher": dataclasses.replace(plain, **teacher),
        "on domains": dataclasses.replace(plain, data_path=(), domains=recipe),
    }


def steps(runs: dict[str, Any], signals: Any, count: int) -> Times:
    """Steps of the runs in turn, and the teacher's forward pass of as many tokens by itself."""
    from megatron_prune.engine.forward.microbatches import Microbatch, Step

    taught = runs["with teacher"]
    tokens = torch.randint(100, (1, taught.options.seq_length), device=taught.groups.device)
    mask = torch.ones_like(tokens, dtype=torch.float32)
    batch = Microbatch(tokens, tokens, mask, mask.sum())
    step = Step(iteration=1, count=1, rows=1, length=taught.options.seq_length)
    times: Times = {}
    for _ in range(WARM_UP + count):
        timed(times, "without", lambda: runs["without"].step(signals))
        timed(
            times,
            "teacher forward",
            lambda: list(taught.objective.beside(iter([batch]), step)),
        )
        timed(times, "with teacher", lambda: taught.step(signals))
        timed(times, "on domains", lambda: runs["on domains"].step(signals))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="student and teacher")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help=".bin/.idx prefixes")
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--top-k", type=int, help="of the teacher's logits")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.train.inputs import open_inputs
    from megatron_prune.engine.train.loop import Training
    from megatron_prune.engine.train.signals import StopSignals
    from megatron_prune.model.grid import ParallelGrid

    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        model_parallel(ParallelGrid()) as groups,
        StopSignals() as signals,
    ):
        kinds = kinds_of_runs(args, Path(folder))
        runs = {
            name: Training(one, groups, open_inputs(one, groups)) for name, one in kinds.items()
        }
        times = steps(runs, signals, args.steps)
        threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))
        dtype = "bf16" if args.bf16 else "fp32"
        print(f"{dtype}, {threads} threads, sequence {args.seq_length}, {groups.device.type}")
        show(times)
        print()
        show_ratio(times, "with teacher", ("without", "teacher forward"))
        show_ratio(times, "on domains", ("without",))
        for name in ("without", "on domains"):
            print(f"drawing a sample {name}: {drawing(runs[name], SAMPLES) * 1e6:.0f} microseconds")
        one = runs.pop("without")
        runs.clear()
        saves(one, signals, args.saves)


if __name__ == "__main__":
    main()
