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
from dataclasses import dataclass
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
SCORED = "magnitude,activation,wanda,flap,residual-energy,taylor,fisher,perplexity"
# removes as many layers as the target; slow, so last
GREEDY = "perplexity-greedy"
OWN = ["--repair"]
FULL = ["--repair", "--repair-target", "stream", "--repair-readers", "--repair-damping", "0.1"]
RESCALE = ["--norm-rescale"]
BEST = "hidden=residual-energy,heads=wanda,ffn=wanda,layers="


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a row is made.

    Attributes:
        flags: of `prune`.
        rotated: start from ``convert --rotate``, scored anew by residual-energy.
    """

    criterion: str
    flags: tuple[str, ...] = ()
    rotated: bool = False


def _units(*criteria: str) -> dict[str, Recipe]:
    """Each criterion cut only and repaired, for heads and FFN."""
    found = {"wanda, repaired in full": Recipe(criterion="wanda", flags=(*FULL,))}
    for name in criteria:
        found[name] = Recipe(criterion=name)
        found[f"{name}, repaired"] = Recipe(criterion=name, flags=(*OWN,))
    return found


def _hidden(*criteria: str) -> dict[str, Recipe]:
    found = {}
    for name in criteria:
        found[name] = Recipe(criterion=name)
        found[f"{name}, rescaled"] = Recipe(criterion=name, flags=(*RESCALE,))
        found[f"{name}, rescaled, repaired in full"] = Recipe(
            criterion=name, flags=(*RESCALE, *FULL)
        )
    for what, flags in (
        ("rescaled", RESCALE),
        ("rescaled, repaired in full", (*RESCALE, *FULL)),
    ):
        found[f"rotated, residual-energy, {what}"] = Recipe(
            criterion="residual-energy", flags=(*flags,), rotated=True
        )
    return found


def _layers(*criteria: str) -> dict[str, Recipe]:
    found = {}
    for name in criteria:
        found[name] = Recipe(criterion=name)
        found[f"{name}, repaired in full"] = Recipe(criterion=name, flags=(*FULL,))
    return found


def _all(layers: str) -> dict[str, Recipe]:
    best = BEST + layers
    return {
        "activation, rescaled, repaired in full": Recipe(
            criterion="activation", flags=(*RESCALE, *FULL)
        ),
        f"best, layers={layers}": Recipe(criterion=best),
        f"best, layers={layers}, rescaled": Recipe(criterion=best, flags=(*RESCALE,)),
        f"best, layers={layers}, rescaled, repaired": Recipe(
            criterion=best, flags=(*RESCALE, *OWN)
        ),
        f"best, layers={layers}, rescaled, repaired in full": Recipe(
            criterion=best, flags=(*RESCALE, *FULL)
        ),
        f"best, layers={layers}, rotated, rescaled, repaired in full": Recipe(
            criterion=best, flags=(*RESCALE, *FULL), rotated=True
        ),
    }


ROWS: dict[str, dict[str, Recipe]] = {
    "FFN 1024": _units("wanda", "activation", "flap", "taylor", "fisher", "magnitude", "random"),
    "heads 6": _units("wanda", "activation", "flap", "taylor", "fisher", "magnitude", "random"),
    "hidden 384": _hidden("residual-energy", "activation", "wanda", "taylor", "magnitude"),
    "24 layers": _layers("activation", "perplexity", GREEDY, "taylor", "magnitude", "random"),
    "all four": {**_all("activation"), **_all(GREEDY)},
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
        self.bf16 = ["--bf16"] if args.bf16 else []
        self.text = ["--data", args.calibration, "--num-samples", args.samples,
                     "--seq-length", 1024]  # fmt: skip
        self.work.mkdir(parents=True, exist_ok=True)

    def sources(self, rotated: bool) -> tuple[Path, Path]:
        """The model to prune and its scores, made where they are not there yet."""
        model, scores = self.args.model, self.work / "scores.safetensors"
        criteria = SCORED
        if rotated:
            model, scores = self.work / "rotated", self.work / "rotated.safetensors"
            criteria = "activation,wanda,residual-energy"
            if not model.exists():
                seconds = run("convert", "--load", self.args.model, "--save", model, "--to", "hf",
                              "--rotate", *self.text, *self.bf16)  # fmt: skip
                print(f"rotation: {seconds:.0f} s", file=sys.stderr)
        if not scores.exists():
            removal = ["--removal-samples", self.args.removal_samples, "--removal-layers", 6]
            for names in (criteria, GREEDY):
                seconds = run("score", "--load", model, "--criterion", names, "--save", scores,
                              *self.text, *removal, *self.bf16)  # fmt: skip
                print(f"scores {names}: {seconds:.0f} s", file=sys.stderr)
        return model, scores

    def row(self, target: str, name: str, recipe: Recipe) -> float:
        """The loss of one recipe at one target."""
        stem = f"{target} {name}".replace(" ", "_").replace(",", "").replace("=", "-")
        result = self.work / f"{stem}.json"
        if result.exists():
            return float(json.loads(result.read_text())["loss"])
        model, scores = self.sources(recipe.rotated)
        plan, pruned = self.work / f"{stem}.plan.json", self.work / "pruned"
        given = [] if recipe.criterion == "random" else ["--scores", scores]
        run("plan", "--load", model, "--save", plan, "--overwrite", "--criterion",
            recipe.criterion, *given, *TARGETS[target])  # fmt: skip
        shutil.rmtree(pruned, ignore_errors=True)
        repair = [*recipe.flags, *self.text, *self.bf16] if recipe.flags else []
        seconds = run("prune", "--load", model, "--plan", plan, "--save", pruned, "--to", "hf",
                      *repair)  # fmt: skip
        loss = evaluate(pruned, self.args.text, self.args.windows, result, self.args.bf16)
        print(f"{target}, {name}: loss {loss:.4f}, prune {seconds:.0f} s", file=sys.stderr)
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
    bench, dense = Bench(args), args.work / "dense.json"
    if not dense.exists():
        evaluate(args.model, args.text, args.windows, dense, args.bf16)
    dense_loss = float(json.loads(dense.read_text())["loss"])
    print(f"dense: loss {dense_loss:.4f}, perplexity {math.exp(dense_loss):.1f}\n")
    print("| target | recipe | loss | perplexity | excess / activation's |\n|---|---|---|---|---|")
    for target, recipes in ROWS.items():
        base = Recipe(criterion="activation")
        baseline = bench.row(target, "activation", base) - dense_loss
        for name, recipe in {"activation": base, **recipes}.items():
            if args.only not in target and args.only not in name:
                continue
            loss = bench.row(target, name, recipe)
            print(f"| {target} | {name} | {loss:.4f} | {math.exp(loss):.1f} "
                  f"| {(loss - dense_loss) / baseline:.3f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
