"""What learned masks are worth: equal tokens, equal final shape, by bits per byte of every domain.

  python benchmarks/shearing.py --model runs/models/SmolLM2-135M-Instruct \\
      --texts prose.train.jsonl code.train.jsonl redpajama/*.jsonl

Every arm ends with the same shape and has trained on the same number of tokens. The baseline is
the walk of the README: a scored plan, repair, and recovery with all tokens. Beside it a random plan
with recovery, and `shear` with a share of the tokens, its gates folded, and recovery with the rest.
Of every text each tenth document is held out. Work is kept in ``--work``, a directory an arm: what
is there is not made again.

With ``--cost`` instead: what masks add to a step, in CPU seconds, against steps of `train`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SIZES = ("hidden-size", "ffn-hidden-size", "num-attention-heads", "num-layers")
SHAPES = {"95M": (540, 1248, 6, 26), "60M": (448, 896, 6, 22)}  # of SmolLM2-135M
CRITERION = "hidden=residual-energy,heads=wanda,ffn=wanda,layers=activation"


class Bench:
    """The arms of one shape."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._work = args.work.resolve()
        self._work.mkdir(parents=True, exist_ok=True)
        self._tokens_per_byte: dict[str, float] = {}
        self._target = [
            word
            for name, size in zip(SIZES, SHAPES[args.shape])
            for word in (f"--{name}-remain", str(size))
        ]

    # ---- texts -------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Corpora of all texts and of their held-out parts, the recipe, calibration text."""
        recipe, mixed = ["domains:"], list[str]()
        for text in self._args.texts:
            name = text.name.split(".")[0]
            rows = text.read_text(encoding="utf-8").splitlines()
            held, kept = rows[9::10], [row for n, row in enumerate(rows) if n % 10 != 9]
            if not held:
                raise SystemExit(f"{text}: {len(rows)} documents; wanted 10 or more")
            mixed += kept[:: max(1, len(kept) // 12)][:12]
            train, valid = self._corpus(name, kept), self._corpus(f"{name}-held", held)
            recipe += [f"  - name: {name}", f"    prefixes: [{train}]",
                       f"    validation: [{valid}]",
                       f"    weight: {1 / len(self._args.texts):.6f}"]  # fmt: skip
            written = sum(len(json.loads(row)["text"].encode()) for row in held)
            tokens = json.loads(Path(f"{valid}.json").read_text())["tokens"]
            self._tokens_per_byte[name] = tokens / written
        (self._work / "domains.yaml").write_text("\n".join(recipe) + "\n")
        (self._work / "calibration.jsonl").write_text("\n".join(mixed))

    def _corpus(self, name: str, rows: list[str]) -> Path:
        prefix, lines = self._work / f"{name}_text_document", self._work / f"{name}.jsonl"
        if not prefix.with_suffix(".idx").exists():
            lines.write_text("\n".join(rows))
            self._run("preprocess", "--input", lines, "--json-key", "text", "--tokenizer-model",
                      self._args.model, "--output-prefix", self._work / name, "--append-eod",
                      "--workers", 1)  # fmt: skip
        return prefix

    def _training(self, iters: int, *more: object) -> list[object]:
        args = self._args
        return ["--domains", self._work / "domains.yaml", "--domain-weighting", "constant",
                "--train-iters", iters, "--micro-batch-size", args.batch_size,
                "--global-batch-size", args.batch_size, "--seq-length", args.seq_length,
                "--split", "95,5,0", "--eval-iters", 0, "--log-interval", 5, "--seed", args.seed,
                "--keep-last", 1, *(["--bf16"] if args.bf16 else []), *more]  # fmt: skip

    def _calibration(self) -> list[object]:
        return ["--data", self._work / "calibration.jsonl", "--num-samples", 16,
                "--seq-length", 512]  # fmt: skip

    # ---- arms --------------------------------------------------------------------------------

    def scored(self, criterion: str = CRITERION) -> Path:
        """A plan by scores (or ``random``), repaired when it is scored."""
        is_random = criterion == "random"
        out = self._work / f"{self._args.shape}-{'random' if is_random else 'scored'}"
        scores, plan = self._work / "scores.safetensors", out.with_suffix(".plan.json")
        by: list[object] = ["--criterion", criterion]
        if not is_random:
            self._make(scores, "score", "--load", self._args.model, *self._calibration(),
                       "--criterion", criterion)  # fmt: skip
            by += ["--scores", scores]
        self._make(plan, "plan", "--load", self._args.model, *by, *self._target)
        repair = [] if is_random else ["--repair", "--norm-rescale", *self._calibration()]
        self._make(out, "prune", "--load", self._args.model, "--plan", plan, "--to", "hf", *repair)
        return out

    def sheared(self, name: str, share: float, flags: list[str]) -> Path:
        """The model that `shear` leaves with a share of the tokens."""
        args, iters = self._args, round(self._args.train_iters * share)
        out = self._work / f"{args.shape}-{name}-pruned"
        if not out.exists():
            flags = [flag.format(work=self._work) for flag in flags]
            self._run("shear", "--load", args.model, "--save", self._work / f"{args.shape}-{name}",
                      *self._target, *self._training(iters, "--lr", args.shear_lr,
                      "--lr-decay-style", "constant"), "--sparsity-warmup-iters", iters // 2,
                      "--save-pruned", out, *flags)  # fmt: skip
        return out

    def recovered(self, model: Path, share: float) -> Path:
        """The model after recovery with a share of the tokens."""
        args, iters = self._args, round(self._args.train_iters * share)
        out = model.with_name(f"{model.name}-recovered")
        if not out.exists():
            self._run("train", "--load", model, "--save", out, *self._training(
                iters, "--lr", args.lr, "--min-lr", args.lr / 10, "--lr-decay-style", "cosine",
                "--lr-warmup-iters", iters // 10))  # fmt: skip
        return out

    def judged(self, model: Path) -> dict[str, float]:
        """Bits per byte of the held-out part of every text."""
        out = self._work / f"{model.name}.losses.json"
        self._make(out, "evaluate", "--load", model, "--domains", self._work / "domains.yaml",
                   "--per-domain", "--seq-length", 256, "--split", "95,5,0",
                   "--max-windows", self._args.windows)  # fmt: skip
        losses = json.loads(out.read_text())["domains"]
        return {
            name: found["loss"] / math.log(2) * self._tokens_per_byte[name]
            for name, found in losses.items()
        }

    # ---- running -----------------------------------------------------------------------------

    def _make(self, save: Path, *words: object) -> None:
        if not save.exists():
            self._run(*words, "--save", save)

    def _run(self, *words: object) -> float:
        """CPU seconds of a command."""
        command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(" ".join(command[2:]), file=sys.stderr, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        for line in done.stderr.splitlines():
            if line.startswith("warning"):
                print(line, file=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def cost(self) -> Iterator[tuple[str, float]]:
        """CPU seconds a step of `train` and of `shear`, the start and the end of a run taken off
        by running it once with a few steps and once with more."""
        for name, words in (("train", ["train"]), ("shear", ["shear", *self._target])):
            spent = []
            for iters in (2, 2 + self._args.train_iters):
                save = self._work / f"cost-{name}-{iters}"
                spent.append(self._run(*words, "--load", self._args.model, "--save", save,
                                       *self._training(iters, "--lr", "1e-5")))  # fmt: skip
            yield name, (spent[1] - spent[0]) / self._args.train_iters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument(
        "--texts", type=Path, nargs="+", required=True, help="JSON lines, a domain each"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-shearing"))
    parser.add_argument("--shape", choices=SHAPES, default="95M")
    parser.add_argument("--train-iters", type=int, default=150, help="steps of every arm")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8, help="of each text, 256 tokens each")
    parser.add_argument("--lr", type=float, default=5e-4, help="of recovery")
    parser.add_argument("--shear-lr", type=float, default=1e-4, help="of the weights in shear")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--plans", nargs="*", default=["scored", "random"], help="arms with a plan")
    parser.add_argument(
        "--shear",
        nargs="*",
        default=["0.5 --mask-lr 0.2 --lagrangian-lr 4 --lagrangian-cap 2"],
        help="arms of shear: share of the tokens, then flags; {work} is --work",
    )
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16")
    parser.add_argument("--cost", action="store_true", help="time steps instead")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    bench = Bench(args)
    bench.prepare()
    if args.cost:
        spent = dict(bench.cost())
        print(
            "\n".join(
                f"{name}: {seconds:.2f} CPU seconds a step" for name, seconds in spent.items()
            )
        )
        print(f"ratio {spent['shear'] / spent['train']:.3f}")
        return
    tokens = args.train_iters * args.batch_size * args.seq_length
    print(f"{args.shape}, {tokens:,} tokens in every arm; bits per byte, held-out text\n")
    rows = {"source": bench.judged(args.model)}
    for name in args.plans:
        criterion = CRITERION if name == "scored" else name
        rows[f"plan, {name}"] = bench.judged(bench.recovered(bench.scored(criterion), 1))
    for arm in args.shear:
        share, *flags = arm.split()
        name = f"shear-{re.sub(r'[^a-z0-9.]+', '-', arm)[:80]}"
        model = bench.sheared(name, float(share), flags)
        rows[f"shear {arm}"] = bench.judged(bench.recovered(model, 1 - float(share)))
    names = list(rows["source"])
    print(f"| arm | {' | '.join(names)} | mean |\n|---|{'---|' * (len(names) + 1)}")
    for name, found in rows.items():
        cells = [f"{x:.3f}" for x in (*found.values(), sum(found.values()) / len(found))]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
