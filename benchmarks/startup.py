"""CPU time of what is no work yet: help, refusals, a look at a checkpoint, a plan, a check.

  python benchmarks/startup.py --model runs/models/SmolLM2-135M-Instruct

Each command runs as a user's, in a new process, ``--repeats`` times after one that is not measured;
the baseline, ``python -c "import torch"``, runs beside it each time. Prints a Markdown table of
medians: user and system time of all threads, which a busy machine changes less than the clock.
Works in a temporary directory below ``--work`` and removes it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def cpu_seconds(command: list[str], wanted: int) -> float:
    """Of one process that has to end with the exit code ``wanted``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != wanted:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(model: Path, work: Path) -> list[tuple[list[object], int]]:
    """Words of every command and its exit code; a later one reads what an earlier one left."""
    dist, plan, out = work / "dist", work / "plan.json", work / "pruned"
    load, keep = ("--load", model), ("--drop-layers", "1")
    return [
        (["--help"], 0),
        (["prune", "--help"], 0),
        (["train", "--help"], 0),
        (["prune", *load, "--save", out, "--to", "hf", "--repair"], 2),
        (["train", *load, "--save", out, "--train-iters", 0], 2),
        (["inspect", model], 0),
        (["convert", *load, "--save", dist, "--to", "megatron", "--overwrite"], 0),
        (["inspect", dist], 0),
        (["plan", *load, "--save", plan, *keep, "--overwrite"], 0),
        (["prune", *load, "--save", out, "--to", "hf", "--plan", plan, "--overwrite"], 0),
        (["verify", "--load", out, "--source", model, "--plan", plan], 0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="where to work")
    args = parser.parse_args()
    print("| command | CPU s | x import torch |\n|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=args.work) as work:
        for words, code in commands(args.model.resolve(), Path(work)):
            command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
            cpu_seconds(command, code)
            pairs = [
                (cpu_seconds(command, code), cpu_seconds([sys.executable, "-c", "import torch"], 0))
                for _ in range(args.repeats)
            ]
            seconds = statistics.median(ours for ours, _ in pairs)
            ratio = statistics.median(ours / torch for ours, torch in pairs)
            shown = " ".join(str(word).replace(f"{work}/", "") for word in words)
            shown = shown.replace(str(args.model.resolve()), "MODEL")
            print(f"| `{shown}` | {seconds:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
