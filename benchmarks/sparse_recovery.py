"""What training brings back: a 2:4 model with its zeros kept, and a dense one of as many weights.

  python benchmarks/sparse_recovery.py --model runs/models/SmolLM2-135M-Instruct \\
      --calibration c4.jsonl --corpus prose.train.jsonl --text wikitext2.valid.txt

Both have half of the weights of the layers' linears: one by `sparsify --pattern 2:4`, the other by
`score`, `plan` and `prune --repair` to 6 of 9 heads and 640 of 1536 FFN channels, which is half of
SmolLM2's to the weight. Both are trained by the same flags on the same tokens. Work is kept in
``--work``: what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

CUT = ["--num-attention-heads-remain", "6", "--ffn-hidden-size-remain", "640"]


class Bench:
    """The two models, before and after."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._work = args, args.work.resolve()
        self._work.mkdir(parents=True, exist_ok=True)

    def make(self) -> dict[str, Path]:
        """Both models, as Hugging Face directories."""
        args, work = self._args, self._work
        data = ["--data", args.calibration, "--num-samples", args.samples]
        data += ["--seq-length", args.calibration_length]
        load, to = ["--load", args.model], ["--to", "hf"]
        self._run(work / "sparse", "sparsify", *load, *to, *data, "--pattern", "2:4",
                  "--method", args.method)  # fmt: skip
        scores, plan = work / "scores.safetensors", work / "plan.json"
        self._run(scores, "score", *load, *data, "--criterion", "heads=wanda,ffn=wanda")
        self._run(plan, "plan", *load, "--scores", scores, "--criterion", "heads=wanda,ffn=wanda",
                  *CUT)  # fmt: skip
        self._run(work / "cut", "prune", *load, *to, "--plan", plan, "--repair", *data)
        return {"2:4, zeros kept": work / "sparse", "cut to half": work / "cut"}

    def train(self, model: Path, *flags: str) -> Path:
        args, out = self._args, self._work / f"{model.name}-trained"
        prefix = self._work / "corpus"
        if not prefix.with_name("corpus_text_document.idx").exists():
            self._run(None, "preprocess", "--input", args.corpus, "--json-key", "text",
                      "--tokenizer-model", args.model, "--output-prefix", prefix,
                      "--append-eod")  # fmt: skip
        self._run(out, "train", "--load", model, "--data-path", f"{prefix}_text_document",
                  "--seq-length", args.seq_length, "--micro-batch-size", args.batch_size,
                  "--global-batch-size", args.batch_size, "--train-iters", args.train_iters,
                  "--lr", args.lr, "--min-lr", args.lr / 10, "--lr-decay-style", "cosine",
                  "--lr-warmup-iters", args.train_iters // 10, "--split", "95,5,0",
                  "--eval-interval", args.train_iters, "--eval-iters", 2,
                  "--save-interval", args.train_iters, *flags)  # fmt: skip
        return out

    def judged(self, model: Path) -> tuple[float, float]:
        """Loss, and the share of zeros that are there now."""
        out, args = self._work / f"{model.name}.json", self._args
        if not out.exists():
            self._run(None, "evaluate", "--load", model, "--data", args.text,
                      "--seq-length", args.calibration_length, "--max-windows", args.windows,
                      "--json", out)  # fmt: skip
        found = json.loads(out.read_text())
        return found["loss"], found.get("sparsity", 0.0)

    def _run(self, save: Path | None, *words: object) -> None:
        if save is not None and save.exists():
            return
        more = [] if save is None else ["--save", save]
        command = [sys.executable, "-m", "megatron_prune", *map(str, [*words, *more])]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("--model", "--calibration", "--corpus", "--text"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-sparse-recovery"))
    parser.add_argument("--method", default="sparsegpt", help="of the 2:4 model")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--calibration-length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=24, help="windows that are judged")
    parser.add_argument("--train-iters", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    args = parser.parse_args()
    bench = Bench(args)
    dense, _ = bench.judged(args.model)
    tokens = args.train_iters * args.batch_size * args.seq_length
    print(f"dense: perplexity {math.exp(dense):.2f}; trained on {tokens:,} tokens\n")
    print("| half of the weights | perplexity | trained | share of the loss brought back | zeros |")
    print("|---|---|---|---|---|")
    for name, model in bench.make().items():
        before, _ = bench.judged(model)
        after, zeros = bench.judged(
            bench.train(model, *(["--keep-zeros"] if "zeros" in name else []))
        )
        share = (before - after) / (before - dense)
        print(
            f"| {name} | {math.exp(before):.2f} | {math.exp(after):.2f} | {share:.1%} "
            f"| {zeros:.4f} |"
        )


if __name__ == "__main__":
    main()
