"""What each criterion, and each part of the repair, is worth without a single training step.

  python benchmarks/criteria.py --model runs/models/SmolLM2-135M-Instruct \\
      --calibration c4.jsonl --text wikitext2.valid.txt

Every row is a user's commands, one after another: one `score` for all, then `plan`, `prune` to
Hugging Face (with or without repair) and `evaluate`. The baseline is ``activation`` without repair,
which is Minitron's formula; "excess" is a row's loss over the dense model's, as a share of the
baseline's. Work is kept in ``--work``: rows that are there are not run again. ``--only`` takes a
part of a target's or a recipe's name.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

FFN, HEADS, HIDDEN, LAYERS = (
    ["--ffn-hidden-size-remain", "1024"],
    ["--num-attention-heads-remain", "6"],
    ["--hidden-size-remain", "384"],
    ["--num-layers-remain", "24"],
)
TARGETS = {
    "FFN 1024": FFN,
    "heads 6": HEADS,
    "hidden 384": HIDDEN,
    "24 layers": LAYERS,
    "all four": [*FFN, *HEADS, *HIDDEN, *LAYERS],
}
SCORED = (
    "magnitude,activation,wanda,flap,residual-energy,taylor,fisher,perplexity,perplexity-greedy"
)
REPAIR, RESCALE = ["--repair"], ["--norm-rescale"]
BEST = "hidden=residual-energy,heads=wanda,ffn=wanda,layers=perplexity-greedy"
# target -> recipe -> criterion, flags of prune
ROWS: dict[str, dict[str, tuple[str, list[str]]]] = {
    "FFN 1024": {
        "random": ("random", []),
        **{name: (name, []) for name in ("magnitude", "activation", "wanda", "flap", "taylor")},
        "activation, repaired": ("activation", REPAIR),
        "wanda, repaired": ("wanda", REPAIR),
    },
    "heads 6": {
        "random": ("random", []),
        **{name: (name, []) for name in ("magnitude", "activation", "wanda", "flap", "taylor")},
        "activation, repaired": ("activation", REPAIR),
        "wanda, repaired": ("wanda", REPAIR),
    },
    "hidden 384": {
        "random": ("random", []),
        **{n: (n, []) for n in ("magnitude", "activation", "wanda", "taylor", "residual-energy")},
        "activation, rescaled": ("activation", RESCALE),
        "residual-energy, rescaled": ("residual-energy", RESCALE),
        "residual-energy, rescaled, repaired": ("residual-energy", [*RESCALE, *REPAIR]),
    },
    "24 layers": {
        "random": ("random", []),
        **{
            n: (n, [])
            for n in ("magnitude", "activation", "taylor", "perplexity", "perplexity-greedy")
        },
        "perplexity-greedy, repaired": ("perplexity-greedy", REPAIR),
    },
    "all four": {
        "activation": ("activation", []),
        "best of each axis": (BEST, []),
        "best of each axis, rescaled": (BEST, RESCALE),
        "best of each axis, rescaled, repaired": (BEST, [*RESCALE, *REPAIR]),
    },
}


def run(*words: object) -> float:
    """Seconds of one command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return time.perf_counter() - began


def evaluate(model: Path, text: Path, windows: int, save: Path, bf16: bool) -> float:
    flags = ["--bf16"] if bf16 else []
    run("evaluate", "--load", model, "--data", text, "--seq-length", 1024, "--max-windows",
        windows, "--json", save, *flags)  # fmt: skip
    return float(json.loads(save.read_text())["loss"])


class Bench:
    """One model, its scores, and where the rows are kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.scores = self.work / "scores.safetensors"

    def row(self, target: str, recipe: str, criterion: str, flags: list[str]) -> float:
        """The loss of one recipe at one target, and how long its repair took."""
        name = f"{target} {recipe}".replace(" ", "_").replace(",", "")
        result = self.work / f"{name}.json"
        if result.exists():
            return float(json.loads(result.read_text())["loss"])
        plan, pruned = self.work / f"{name}.plan.json", self.work / "pruned"
        scores = [] if criterion == "random" else ["--scores", self.scores]
        run("plan", "--load", self.args.model, "--save", plan, "--overwrite", "--criterion",
            criterion, *scores, *TARGETS[target])  # fmt: skip
        shutil.rmtree(pruned, ignore_errors=True)
        if flags:
            flags = [*flags, "--data", str(self.args.calibration), "--num-samples",
                     str(self.args.samples), "--seq-length", "1024"]  # fmt: skip
            flags += ["--bf16"] if self.args.bf16 else []
        seconds = run("prune", "--load", self.args.model, "--plan", plan, "--save", pruned,
                      "--to", "hf", *flags)  # fmt: skip
        loss = evaluate(pruned, self.args.text, self.args.windows, result, self.args.bf16)
        print(f"{target}, {recipe}: loss {loss:.4f}, prune {seconds:.0f} s", file=sys.stderr)
        return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--calibration", type=Path, required=True, help="JSON lines or text")
    parser.add_argument("--text", type=Path, required=True, help="to judge on")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows of 1024")
    parser.add_argument("--windows", type=int, default=24, help="judged windows of 1024")
    parser.add_argument("--removal-samples", type=int, default=2, help="of those, for perplexity")
    parser.add_argument("--bf16", action="store_true", help="score, repair and judge in bfloat16")
    parser.add_argument("--work", type=Path, default=Path("runs/criteria"), help="where to work")
    parser.add_argument("--only", default="", help="part of a target's or a recipe's name")
    args = parser.parse_args()
    bench, bf16 = Bench(args), ["--bf16"] if args.bf16 else []
    dense = bench.work / "dense.json"
    if not dense.exists():
        evaluate(args.model, args.text, args.windows, dense, args.bf16)
    dense_loss = float(json.loads(dense.read_text())["loss"])
    seconds = run("score", "--load", args.model, "--data", args.calibration, "--criterion", SCORED,
                  "--num-samples", args.samples, "--seq-length", 1024, "--save", bench.scores,
                  "--removal-layers", 6, "--removal-samples", args.removal_samples,
                  *bf16)  # fmt: skip
    print(f"scores: {seconds:.0f} s", file=sys.stderr)
    print(f"dense: loss {dense_loss:.4f}, perplexity {math.exp(dense_loss):.1f}\n")
    print("| target | recipe | loss | perplexity | excess / activation's |\n|---|---|---|---|---|")
    for target, recipes in ROWS.items():
        baseline = bench.row(target, "activation", "activation", []) - dense_loss
        for recipe, (criterion, flags) in recipes.items():
            if args.only not in target and args.only not in recipe:
                continue
            loss = bench.row(target, recipe, criterion, flags)
            print(f"| {target} | {recipe} | {loss:.4f} | {math.exp(loss):.1f} "
                  f"| {(loss - dense_loss) / baseline:.3f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
