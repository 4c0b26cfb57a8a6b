"""What one-shot sparsity costs in loss: methods x patterns on one model, without training.

  python benchmarks/sparsity.py --model runs/models/SmolLM2-135M-Instruct \\
      --calibration c4.jsonl --text wikitext2.valid.txt

Every row is a user's commands, `sparsify` to Hugging Face and `evaluate`. The baseline is SparseGPT
with the same zeros; "excess" is a row's loss (the logarithm of its perplexity) over the dense
model's, as a share of the baseline's. Results are kept in ``--work``: rows that are there are not
run again, so the table can be made in parts.
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
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

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
    "60%": ["wanda", "sparsegpt", "admm", "alps"],
    "70%": [
        *("wanda", "sparsegpt", "admm", "alps"),
        *("alps, true sequential", "alps, owl", "sparsegpt, owl"),
    ],
}


class Table:
    """The rows so far, a file each in ``--work``."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        args.work.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in self._args.work.glob("*.row.json")]
        return {row["name"]: row for row in found}

    def _keep(self, name: str, **row: object) -> None:
        path = self._args.work / f"{_file_name(name)}.row.json"
        path.write_text(json.dumps({"name": name, **row}, indent=1))
        print(name, row, file=sys.stderr, flush=True)

    def row(self, pattern: str, method: str, flags: list[str]) -> None:
        """Run a row, unless it is there."""
        name, args = f"{pattern} {method}", self._args
        wanted = any(fnmatch(name, only) for only in args.only or ["*"])
        if not wanted or name in self.rows:
            return
        out = args.work / _file_name(name)
        shutil.rmtree(out, ignore_errors=True)
        about = ["--load", args.model, "--save", out, "--to", "hf", *PATTERNS[pattern], *flags]
        if method != "magnitude":
            about += ["--data", args.calibration, "--num-samples", args.samples]
            about += ["--seq-length", args.seq_length]
        began = time.monotonic()
        said = self._run("sparsify", *about)
        seconds = time.monotonic() - began
        record = json.loads((out / "sparsity.json").read_text())
        self._keep(
            name,
            loss=self.loss(out),
            reached=record["reached"],
            seconds=seconds,
            data_digest=record["settings"].get("data_digest"),
            said=said.splitlines()[0],
        )
        shutil.rmtree(out)

    def dense(self) -> None:
        """The model itself."""
        if "dense" not in self.rows:
            self._keep("dense", loss=self.loss(self._args.model))

    def loss(self, path: Path) -> float:
        args, out = self._args, self._args.work / f"{_file_name(path.name)}.judged.json"
        self._run(
            "evaluate", "--load", path, "--data", args.text, "--seq-length", args.seq_length,
            "--max-windows", args.windows, "--json", out,
        )  # fmt: skip
        return float(json.loads(out.read_text())["loss"])

    def _run(self, *words: object) -> str:
        command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return done.stdout

    def show(self) -> None:
        """The table, a pattern below the other."""
        rows = self.rows
        dense = rows.pop("dense")["loss"]
        print(f"dense: perplexity {math.exp(dense):.2f}\n")
        print("| zeros | method | perplexity | excess loss | of SparseGPT's | seconds |")
        print("|---|---|---|---|---|---|")
        for pattern in PATTERNS:
            base = rows.get(f"{pattern} sparsegpt")
            for method in METHODS:
                if (row := rows.get(f"{pattern} {method}")) is None:
                    continue
                excess = row["loss"] - dense
                share = "" if base is None else f"{excess / (base['loss'] - dense):.3f}"
                print(
                    f"| {pattern} | {method} | {math.exp(row['loss']):.2f} | {excess:.4f} | "
                    f"{share} | {row['seconds']:.0f} |"
                )


def _file_name(text: str) -> str:
    return re.sub(r"[^\w]+", "-", text)


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
    parser.add_argument("--only", nargs="*", default=[], help="rows such as '2:4 alps' or '50% *'")
    args = parser.parse_args()
    table = Table(args)
    table.dense()
    for pattern, methods in WANTED.items():
        for name in methods:
            table.row(pattern, name, METHODS[name])
    table.show()


if __name__ == "__main__":
    main()
