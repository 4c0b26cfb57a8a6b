"""What recovery buys: constant or dynamic domains, LM loss or distillation, pruned or random.

  python benchmarks/recovery.py --source runs/models/SmolLM2-135M-Instruct \\
      --pruned RUN_DIR/pruned --corpus runs/corpus --bf16

``--pruned`` is what the walk has pruned (``scripts/prune_llama.sh``), ``--corpus`` a directory of
``NAME.train.jsonl`` and ``NAME.eval.txt`` for each domain (``tools/make_default_corpus.py``). Every
row is one `train` on the same number of tokens and one `evaluate` a domain, on text that is not
trained on. ``equal time`` rows get fewer steps: as many as fit into the time of the LM rows when a
step with a teacher takes ``--teacher-cost`` times one without (`benchmarks/step_time.py`). Work is
kept in ``--work``: what is there is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

WARM_UP = 2


@dataclass(frozen=True, kw_only=True)
class Row:
    """How a run differs: how domains are weighted, what it learns from, what it starts from."""

    dynamic: bool = False
    lm_weight: float = 1  # the rest of the loss is the teacher's
    random: bool = False
    equal_time: bool = False


ROWS = {
    "LM loss, constant": Row(),
    "LM loss, dynamic": Row(dynamic=True),
    "distilled, constant": Row(lm_weight=0),
    "distilled, dynamic": Row(lm_weight=0, dynamic=True),
    "half distilled, constant": Row(lm_weight=0.5),
    "half distilled, constant, equal time": Row(lm_weight=0.5, equal_time=True),
    "random weights, LM loss, constant": Row(random=True),
}


def run(*words: object) -> None:
    command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


class Bench:
    """The domains, the targets of the source model, and the rows made so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work = args, args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.engine = ["--bf16"] if args.bf16 else []
        self.cut = ["--seq-length", args.seq_length, "--split", "95,5,0"]
        self.names = sorted(p.name.split(".")[0] for p in args.corpus.glob("*.train.jsonl"))
        self.recipe = self.work / "domains.yaml"
        targets = self.work / "targets.json"
        if not targets.exists():
            self._prepare(targets)

    def _prepare(self, targets: Path) -> None:
        """Tokenise, and measure what the source model reaches on each domain."""
        domains = []
        for name in self.names:
            prefix = self.work / f"{name}_text_document"
            if not prefix.with_suffix(".idx").exists():
                run("preprocess", "--input", self.args.corpus / f"{name}.train.jsonl",
                    "--json-key", "text", "--tokenizer-model", self.args.source,
                    "--output-prefix", self.work / name, "--append-eod")  # fmt: skip
            domains.append({"name": name, "prefixes": [str(prefix)], "weight": 1})
        self.recipe.write_text(yaml.safe_dump({"domains": domains}))
        run("evaluate", "--load", self.args.source, "--domains", self.recipe, "--per-domain",
            "--max-windows", self.args.eval_iters * self.args.global_batch_size, "--save", targets,
            *self.cut, *self.engine)  # fmt: skip
        self.recipe.write_text(yaml.safe_dump({"targets": str(targets), "domains": domains}))

    def steps(self, row: Row) -> int:
        if not row.equal_time:
            return int(self.args.steps)
        return round(self.args.steps / self.args.teacher_cost)

    def _rows(self, name: str) -> list[dict[str, float]]:
        lines = (self.save(name) / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def seconds(self, name: str) -> float:
        """Median of a step."""
        found = [row["seconds"] for row in self._rows(name) if "lm loss" in row]
        return statistics.median(found[WARM_UP:])

    def save(self, name: str) -> Path:
        return self.work / name.replace(",", "").replace(" ", "_")

    def train(self, name: str, row: Row) -> None:
        args, steps = self.args, self.steps(row)
        flags: list[object] = ["--domain-weighting", "dynamic" if row.dynamic else "constant"]
        if row.dynamic:
            flags += ["--domain-update-interval", args.update_interval]
        if row.lm_weight < 1:
            flags += ["--teacher", args.source, "--distill-lm-weight", str(row.lm_weight)]
        flags += ["--init-random"] if row.random else []
        run("train", "--load", args.pruned, "--save", self.save(name), "--domains", self.recipe,
            "--train-iters", steps, "--micro-batch-size", args.micro_batch_size,
            "--global-batch-size", args.global_batch_size, "--lr", args.lr, "--min-lr",
            args.lr / 10, "--lr-decay-style", "cosine", "--lr-warmup-iters", steps // 10,
            "--eval-iters", args.eval_iters, "--eval-interval", args.update_interval,
            "--log-interval", 1, *self.cut, *flags, *self.engine)  # fmt: skip

    def bits_per_byte(self, name: str, checkpoint: Path) -> list[float]:
        """Of each domain's held-out text, and of the other text."""
        texts = {domain: self.args.corpus / f"{domain}.eval.txt" for domain in self.names}
        if self.args.other is not None:
            texts["other"] = self.args.other
        found = []
        for domain, text in texts.items():
            result = self.work / f"{self.save(name).name}.{domain}.json"
            if not result.exists():
                run("evaluate", "--load", checkpoint, "--data", text, "--seq-length", 512,
                    "--max-windows", self.args.windows, "--json", result,
                    *self.engine)  # fmt: skip
            found.append(float(json.loads(result.read_text())["bits_per_byte"]))
        return found

    def shares(self, name: str) -> list[float]:
        """What was drawn of each domain, by the last validation."""
        told = [row for row in self._rows(name) if f"domain token share/{self.names[0]}" in row]
        return [told[-1][f"domain token share/{domain}"] for domain in self.names]


def _line(name: str, steps: object, seconds: str, bits: list[float], shares: str) -> None:
    cells = " | ".join(f"{x:.3f}" for x in bits)
    print(f"| {name} | {steps} | {seconds} | {cells} | {shares} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="teacher, and the targets")
    parser.add_argument("--pruned", type=Path, required=True, help="where every row starts")
    parser.add_argument(
        "--corpus", type=Path, required=True, help="NAME.train.jsonl, NAME.eval.txt"
    )
    parser.add_argument("--other", type=Path, help="text of another kind, to judge on as well")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--update-interval", type=int, default=20, help="steps, of dynamic weights")
    parser.add_argument("--eval-iters", type=int, default=4, help="batches of each domain")
    parser.add_argument("--windows", type=int, default=16, help="judged, of 512 tokens a domain")
    parser.add_argument(
        "--teacher-cost", type=float, default=1.5, help="of a step, times one without"
    )
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"), help="where to work")
    parser.add_argument("--only", default="", help="part of a row's name")
    args = parser.parse_args()
    bench = Bench(args)
    columns = [*bench.names, *([] if args.other is None else [args.other.name])]
    print("| run | steps | s a step | bits/byte: " + " | ".join(columns) + " | drawn |")
    print("|" + "---|" * (len(columns) + 4))
    for name, checkpoint in (("source", args.source), ("pruned", args.pruned)):
        _line(name, 0, "", bench.bits_per_byte(name, checkpoint), "")
    for name, row in ROWS.items():
        if args.only not in name:
            continue
        bench.train(name, row)
        bits = bench.bits_per_byte(name, bench.save(name))
        shares = " / ".join(f"{share:.2f}" for share in bench.shares(name))
        _line(name, bench.steps(row), f"{bench.seconds(name):.2f}", bits, shares)


if __name__ == "__main__":
    main()
