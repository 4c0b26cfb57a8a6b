"""What one-shot sparsity costs in loss: methods x patterns on one model, without training.

  python benchmarks/sparsity.py --model runs/models/SmolLM2-135M-Instruct \\
      --calibration c4.jsonl --text wikitext2.valid.txt

Every row is a user's commands, `sparsify` to Hugging Face and `evaluate`. The baseline is SparseGPT
with the same zeros; "excess" is a row's loss (the logarithm of its perplexity) over the dense
model's, as a share of the baseline's. Results are kept in ``--work``: rows that are there are not
run again, so the table can be made in parts. ``--only`` takes parts of rows' names.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

PATTERNS = {
    "50%": ["--sparsity", "0.5"],
    "4:8": ["--pattern", "4:8"],
    "2:4": ["--pattern", "2:4"],
    "60%": ["--sparsity", "0.6"],
    "70%": ["--sparsity", "0.7"],
}
METHODS = {
    "magnitude": ["--method", "magnitude"],
    "wanda": ["--method", "wanda"],
    "wanda, variant": ["--method", "wanda", "--variant"],
    "sparsegpt": ["--method", "sparsegpt"],
    "magnitude, seq": ["--method", "magnitude", "--weight-update", "seq"],
    "magnitude, iter": ["--method", "magnitude", "--weight-update", "iter"],
    "wanda, seq": ["--method", "wanda", "--weight-update", "seq"],
    "wanda, iter": ["--method", "wanda", "--weight-update", "iter"],
    "wanda, refit": ["--method", "wanda", "--refit"],
    "sparsegpt, refit": ["--method", "sparsegpt", "--refit"],
    "admm": ["--method", "admm"],
    "alps": ["--method", "alps"],
    "alps, true sequential": ["--method", "alps", "--true-sequential"],
    "alps, owl": ["--method", "alps", "--sparsity-by-layer", "owl"],
    "sparsegpt, true sequential": ["--method", "sparsegpt", "--true-sequential"],
    "sparsegpt, owl": ["--method", "sparsegpt", "--sparsity-by-layer", "owl"],
}
WANTED = {  # pattern -> methods that the table has; others by --rows
    "50%": [*METHODS],
    "4:8": ["magnitude", "wanda", "sparsegpt", "admm", "alps"],
    "2:4": [name for name in METHODS if "owl" not in name and "variant" not in name],
    "60%": ["wanda", "sparsegpt", "alps"],
    "70%": ["wanda", "sparsegpt", "alps", "alps, true sequential", "alps, owl", "sparsegpt, owl"],
}


class Table:
    """The rows so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        args.work.mkdir(parents=True, exist_ok=True)
        self._path = args.work / "rows.json"
        self.rows = json.loads(self._path.read_text()) if self._path.is_file() else {}

    def row(self, pattern: str, name: str, flags: list[str]) -> None:
        """Run a row, unless it is there."""
        key = f"{pattern} {name}"
        if key in self.rows or (
            self._args.only and not any(part in key for part in self._args.only)
        ):
            return
        out, args = self._args.work / re.sub(r"[^\w]+", "-", key), self._args
        shutil.rmtree(out, ignore_errors=True)
        text = (
            []
            if "--method magnitude" in " ".join(flags) and "--weight" not in " ".join(flags)
            else ["--data", args.calibration, "--num-samples", args.samples]
        )
        if text:
            text += ["--seq-length", args.seq_length]
        began = time.monotonic()
        said = self._run(
            "sparsify", "--load", args.model, "--save", out, "--to", "hf", *PATTERNS[pattern],
            *flags, *text,
        )  # fmt: skip
        seconds = time.monotonic() - began
        record = json.loads((out / "sparsity.json").read_text())
        self.rows[key] = {
            **self.evaluated(out),
            "reached": record["reached"],
            "seconds": seconds,
            "data_digest": record["settings"].get("data_digest", ""),
            "said": said.splitlines()[-3:],
        }
        shutil.rmtree(out)
        self._path.write_text(json.dumps(self.rows, indent=1))
        print(key, self.rows[key], file=sys.stderr, flush=True)

    def dense(self) -> None:
        """The model itself."""
        if "dense" not in self.rows:
            self.rows["dense"] = self.evaluated(self._args.model)
            self._path.write_text(json.dumps(self.rows, indent=1))

    def evaluated(self, path: Path) -> dict[str, float]:
        out, args = self._args.work / "judged.json", self._args
        self._run(
            "evaluate", "--load", path, "--data", args.text, "--seq-length", args.seq_length,
            "--max-windows", args.windows, "--json", out,
        )  # fmt: skip
        return {"loss": json.loads(out.read_text())["loss"]}

    def _run(self, *words: object) -> str:
        command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return done.stdout

    def show(self) -> None:
        """The table, a pattern below the other."""
        dense = self.rows["dense"]["loss"]
        print(f"dense: perplexity {math.exp(dense):.2f}\n")
        print("| zeros | method | perplexity | excess loss | of SparseGPT's | seconds |")
        print("|---|---|---|---|---|---|")
        for key, row in sorted(
            self.rows.items(),
            key=lambda item: [*PATTERNS].index(item[0].split(" ")[0]) if " " in item[0] else -1,
        ):
            if key == "dense":
                continue
            pattern, name = key.split(" ", 1)
            base = self.rows.get(f"{pattern} sparsegpt")
            excess = row["loss"] - dense
            share = "" if base is None else f"{excess / (base['loss'] - dense):.3f}"
            print(
                f"| {pattern} | {name} | {math.exp(row['loss']):.2f} | {excess:.4f} | {share} | "
                f"{row['seconds']:.0f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-sparsity"))
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=24, help="windows that are judged")
    parser.add_argument("--only", nargs="*", default=[], help="parts of rows' names")
    args = parser.parse_args()
    table = Table(args)
    table.dense()
    for pattern, methods in WANTED.items():
        for name in methods:
            table.row(pattern, name, METHODS[name])
    table.show()


if __name__ == "__main__":
    main()
