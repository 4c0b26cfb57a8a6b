"""Convert, prune and reshard against ``cp`` of the same bytes: wall time and private memory.

  python benchmarks/file_steps.py --model runs/models/SmolLM2-135M-Instruct
  python benchmarks/file_steps.py --synthetic llama2-7b --repeats 1
  python benchmarks/file_steps.py --synthetic llama2-7b --repeats 1 \
      --tokenizer llama2.tokenizer.model --only 'vocab*'

Every step runs as a user's command, in its own process; the time of an ``inspect`` just before it
(start-up) is taken off, and the outputs are flushed to disk before the clock stops. The baseline,
``cp`` and a flush of what a step *wrote*, runs right after the step, so both meet the same machine;
so does SHA-256 of the same bytes, which a step computes too, one thread a file. Both read from the
page cache; with ``--cold`` (the default for a synthetic model, which the cache does not hold) both
read from the disk. RssAnon is the peak over samples of /proc every 20 ms. Prints a Markdown table
of medians. Works in a temporary directory below ``--work`` and removes it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.families.llama import LLAMA
from megatron_prune.files import hash_file
from megatron_prune.model.axes import axes_of, split_dim, tensor_shape
from megatron_prune.model.grid import VOCAB_DIVISOR
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.model.tensors import torch_dtype
from megatron_prune.ranks import Ranks
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source
from megatron_prune.surgery import Target, write_checkpoint

VOCABULARY_STEP = "vocab prune hf -> hf"
LLAMA2_7B = ModelShape(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=11008,
    num_attention_heads=32,
    num_query_groups=32,
    kv_channels=128,
    vocab_size=32000,
)


class SyntheticSource(Source):
    """A model of any shape whose weights repeat one block of noise: real bytes, no meaning."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.path, self.format = config, Path("synthetic"), "synthetic"
        self.companion_files = {}
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1 << 22, generator=generator) * 0.02
        self._noise = noise.to(torch_dtype(config.dtype))

    def dtype(self, name: str) -> torch.dtype:
        return torch_dtype(self.config.dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        shape = torch.Size(tensor_shape(name, self.config.shape))
        copies = -(-shape.numel() // self._noise.numel())
        whole = self._noise.repeat(copies)[: shape.numel()].view(shape)
        dim = split_dim(axes_of(name))
        if dim is None or stop is None:
            return whole
        rows = self.config.shape.rows(axes_of(name)[dim])
        return whole.narrow(dim, start * rows, (stop - start) * rows)


def private_bytes(pid: int) -> int:
    """RssAnon of a process, 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((x for x in text.splitlines() if x.startswith("RssAnon")), "RssAnon: 0 kB")
    return int(line.split()[1]) * 1024


def measure(*words: object) -> tuple[float, int]:
    """Seconds and peak private bytes of one command."""
    env = dict(os.environ, OMP_NUM_THREADS="1")
    began, peak = time.perf_counter(), 0
    command = [sys.executable, "-m", "megatron_prune", *map(str, words)]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            peak = max(peak, private_bytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.returncode:
            assert process.stderr is not None
            raise SystemExit(f"{' '.join(command)}\n{process.stderr.read()}")
    return seconds, peak


def prepare(directory: Path, cold: bool) -> None:
    """Drop a directory's files from the page cache, or bring them there."""
    for path in directory.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                if cold:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                else:
                    hashlib.file_digest(file, "md5")


def copy_seconds(source: Path, target: Path) -> float:
    """``cp -r`` and a flush of every file."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def hash_seconds(target: Path) -> float:
    """SHA-256 of every file, one after another."""
    began = time.perf_counter()
    for path in target.rglob("*"):
        if path.is_file():
            hash_file(path)
    return time.perf_counter() - began


def steps(model: Path, work: Path, shape: ModelShape, tp: int) -> list[tuple[str, list[object]]]:
    """Name and command of every step; a later one reads what an earlier one left."""
    half = [
        "--hidden-size-remain", shape.hidden_size * 3 // 4,
        "--ffn-hidden-size-remain", shape.ffn_hidden_size * 3 // 4 // tp * tp,
        "--num-attention-heads-remain",
        shape.num_query_groups * max(1, shape.heads_per_group * 2 // 3),
        "--balance-for", tp,
    ]  # fmt: skip
    to = ["--to", "megatron", "--tensor-model-parallel-size", tp, "--ckpt-format"]
    dist, legacy, hf = work / "dist", work / "legacy", work / "hf"
    return [
        ("convert hf -> torch_dist",
         ["convert", "--load", model, "--save", dist, *to, "torch_dist"]),
        ("convert torch_dist -> hf", ["convert", "--load", dist, "--save", hf, "--to", "hf"]),
        ("convert hf -> torch", ["convert", "--load", model, "--save", legacy, *to, "torch"]),
        ("convert torch -> hf", ["convert", "--load", legacy, "--save", hf, "--to", "hf"]),
        ("prune hf -> hf", ["prune", "--load", model, "--save", hf, "--to", "hf", *half]),
        ("prune torch_dist -> torch_dist",
         ["prune", "--load", dist, "--save", work / "out", *to, "torch_dist", *half]),
        ("prune torch_dist -> hf",
         ["prune", "--load", dist, "--save", hf, "--to", "hf", *half]),
        ("reshard torch_dist to TP=1", ["reshard", "--load", dist, "--save", work / "out"]),
        ("reshard torch to TP=1", ["reshard", "--load", legacy, "--save", work / "out"]),
    ]  # fmt: skip


def vocabulary_step(
    model: Path, work: Path, shape: ModelShape, tp: int
) -> tuple[str, list[object]]:
    """Half of the tokens, by the order in which they were learned."""
    plan, multiple = work / "vocab_plan.json", VOCAB_DIVISOR * tp
    size = ("--vocab-size-remain", shape.vocab_size // 2 // multiple * multiple)
    measure("vocab", "plan", "--tokenizer", model, *size, "--save", plan)
    words = ["vocab", "prune", "--load", model, "--save", work / "hf", "--to", "hf", "--plan", plan]
    return VOCABULARY_STEP, words


def run(
    model: Path, work: Path, listed: list[tuple[str, list[object]]], repeats: int, cold: bool
) -> None:
    """Measure the steps listed; a row each."""
    idle = measure("inspect", model)[1]
    print(f"private memory at start-up (inspect): {idle / 2**20:.0f} MiB\n")
    print("| step | MB written | cp s | SHA-256 s | step s | x cp | private MiB above start-up |")
    print("|---|---|---|---|---|---|---|")
    for name, words in listed:
        source, target = (Path(str(words[words.index(w) + 1])) for w in ("--load", "--save"))
        taken, copies, hashes, peaks, written = [], [], [], [], 0
        for _ in range(repeats):
            shutil.rmtree(target, ignore_errors=True)
            prepare(source, cold)
            startup = measure("inspect", model)[0]
            seconds, peak = measure(*words)
            written = sum(p.stat().st_size for p in target.rglob("*") if p.is_file())
            taken.append(max(seconds - startup, 0.0))
            prepare(target, cold)
            copies.append(copy_seconds(target, work / "copy"))
            hashes.append(hash_seconds(target))
            peaks.append(peak)
        if target.name in ("hf", "out"):
            shutil.rmtree(target)
        ratio = statistics.median(a / b for a, b in zip(taken, copies))
        print(
            f"| {name} | {written / 1e6:.0f} | {statistics.median(copies):.2f} "
            f"| {statistics.median(hashes):.2f} | {statistics.median(taken):.2f} | {ratio:.2f} "
            f"| {(max(peaks) - idle) / 2**20:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="Hugging Face directory to work on")
    parser.add_argument("--synthetic", choices=["llama2-7b"], help="make one of this shape, bf16")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece file of the synthetic model")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="of the steps' names")
    parser.add_argument("--layers", type=int, help="of the synthetic model")
    parser.add_argument("--tensor-model-parallel-size", type=int, help="of the Megatron side")
    parser.add_argument("--cold", action="store_true", help="read everything from the disk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path.cwd(), help="where to work")
    args = parser.parse_args()
    if (args.model is None) == (args.synthetic is None):
        parser.error("give --model or --synthetic")
    work = Path(tempfile.mkdtemp(prefix="benchmark-", dir=args.work))
    try:
        model = args.model
        if model is None:
            shape = replace(LLAMA2_7B, num_layers=args.layers or LLAMA2_7B.num_layers)
            config = ModelConfig(family=LLAMA, shape=shape, tied=False, dtype="bf16", hf_config={})
            model = work / "model"
            target = Target(directory=model, format="hf")
            write_checkpoint(SyntheticSource(config), target, ranks=Ranks(rank=0, world_size=1))
            if args.tokenizer is not None:
                shutil.copy(args.tokenizer, model / "tokenizer.model")
        shape = open_source(model).config.shape
        tp = args.tensor_model_parallel_size or (3 if shape.num_query_groups % 8 else 8)
        shape.check_tensor_parallel(tp)
        cold = args.cold or args.synthetic is not None
        listed = [s for s in steps(model, work, shape, tp) if fnmatch(s[0], args.only)]
        if any(model.glob("tokenizer*")) and fnmatch(VOCABULARY_STEP, args.only):
            listed.append(vocabulary_step(model, work, shape, tp))
        run(model, work, listed, args.repeats, cold)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
