"""Text to Megatron's .bin/.idx on many machines: datatrove's Megatron writer, with our choices.

  pip install 'megatron_prune[cluster]'
  python recipes/preprocess_on_a_cluster.py --input /data/web --tokenizer-model /models/llama \\
      --save /data/tokens --executor slurm --partition cpu --time 20:00:00

Every file of ``--input`` (.jsonl, .jsonl.gz) is one task and becomes one corpus in ``--save``:
00000_tokens.bin and .idx for the first by name, and so on, byte for byte what `preprocess
--append-eod` makes of that file. Two differences: documents without text are left out, and there is
no sidecar, so `train` cannot tell which tokenizer made the corpus. Started again, it does only the
tasks that are not done yet. The tests run the local executor; Slurm and Ray are datatrove's own.

The corpora are printed as words for ``--data-path`` (or ``prefixes`` of a domain) of `train`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizers import load_tokenizer
from megatron_prune.errors import ConfigError


def writer(tokenizer_model: Path, save: Path) -> Any:
    """datatrove's step that tokenises and writes, with the tokenizer's own special tokens."""
    from datatrove.pipeline.tokens import MegatronDocumentTokenizer
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    file = tokenizer_model / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; datatrove reads no other form of a tokenizer")
    tokenizer, bare = load_tokenizer(tokenizer_model), Tokenizer.from_file(str(file))
    if tokenizer.eod is None:
        raise ConfigError(f"{tokenizer_model}: its files do not tell the EOS token")
    front = [bare.id_to_token(i) for i in tokenizer.encode("", add_special_tokens=True)]
    end = bare.id_to_token(tokenizer.eod)
    step = MegatronDocumentTokenizer(str(save), tokenizer_name_or_path=str(file), eos_token=end)
    step.post_processor = TemplateProcessing(
        single=[*front, "$A", end],
        special_tokens=[(token, bare.token_to_id(token)) for token in {*front, end}],
    )
    return step


def executor(args: argparse.Namespace, pipeline: list[Any], tasks: int) -> Any:
    shared = {"pipeline": pipeline, "tasks": tasks, "logging_dir": str(args.save / "logs")}
    if args.executor == "local":
        from datatrove.executor import LocalPipelineExecutor

        return LocalPipelineExecutor(**shared, workers=args.workers)
    if args.executor == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        return RayPipelineExecutor(**shared, workers=args.workers)
    from datatrove.executor import SlurmPipelineExecutor

    if args.partition is None:
        raise ConfigError("--executor slurm: give --partition NAME and --time HH:MM:SS")
    return SlurmPipelineExecutor(
        **shared, workers=args.workers, partition=args.partition, time=args.time
    )


def run(args: argparse.Namespace) -> None:
    from datatrove.pipeline.readers import JsonlReader

    files = sorted(p for p in args.input.iterdir() if ".jsonl" in p.suffixes)
    if not files:
        raise ConfigError(f"--input {args.input}: no .jsonl file in this directory")
    args.save.mkdir(parents=True, exist_ok=True)
    reader = JsonlReader(
        str(args.input), text_key=args.json_key, glob_pattern="*.jsonl*", recursive=False
    )
    pipeline = [reader, writer(args.tokenizer_model, args.save)]
    executor(args, pipeline, len(files)).run()
    for number in range(len(files)):
        print(args.save / f"{number:05d}_tokens")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, required=True, metavar="DIR")
    parser.add_argument("--json-key", default="text", metavar="KEY", help="default: text")
    parser.add_argument("--tokenizer-model", type=Path, required=True, metavar="HF_DIR")
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="on a shared disk")
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument(
        "--workers", type=int, default=-1, metavar="N", help="tasks at a time (default: all)"
    )
    parser.add_argument("--partition", metavar="NAME", help="slurm's")
    parser.add_argument("--time", default="24:00:00", metavar="HH:MM:SS", help="slurm's, a task")
    args = parser.parse_args()
    try:
        run(args)
    except ConfigError as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
