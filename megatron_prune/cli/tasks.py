"""``evaluate --tasks``: benchmark tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_prune.cli import options
from megatron_prune.cli.engine_flags import dtype_of, process_groups
from megatron_prune.errors import ConfigError

TASK_FLAGS = ("num_fewshot", "limit", "include_path", "apply_chat_template")


def add_task_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that go with ``--tasks``, under the harness' own names."""
    group = parser.add_argument_group("benchmark tasks (needs pip install 'megatron_prune[eval]')")
    group.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME[:EXAMPLES]",
        help="of lm-evaluation-harness, instead of --data; recipes/standard_tasks.yaml has a list",
    )
    group.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples before each question, where NAME does not say (default: the task's)",
    )
    group.add_argument("--limit", type=options.positive, metavar="N", help="questions of each task")
    group.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="ask as a user does, with the model's chat template; examples are earlier turns",
    )
    group.add_argument("--include-path", type=Path, metavar="DIR", help="task files of your own")
    group.add_argument(
        "--backend",
        choices=("auto", "hf", "megatron"),
        default="auto",
        help="auto: the harness' own for Hugging Face directories in one process, else this one's",
    )


def run_tasks(args: argparse.Namespace) -> None:
    """Run the tasks, print a table, write the results."""
    from megatron_prune.engine.groups import data_parallel_size, world_size
    from megatron_prune.evaluate import tasks

    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ConfigError(f"--num-fewshot {args.num_fewshot}; wanted 0 or more")
    wanted = tasks.parse_tasks(args.tasks, args.num_fewshot)
    tasks.check_harness()
    grid = options.grid_from(args)
    data_parallel_size(grid, world_size())
    given = tasks.TaskOptions(
        load=args.load,
        tasks=wanted,
        limit=args.limit,
        include_path=args.include_path,
        apply_chat_template=args.apply_chat_template,
        micro_batch_size=args.micro_batch_size,
        max_length=args.seq_length,
        tokenizer_model=args.tokenizer_model,
        dtype=dtype_of(args),
        transformer_impl=args.transformer_impl,
        sequence_parallel=args.sequence_parallel,
        family=args.family,
    )
    if args.save is not None:
        inputs = (args.load, args.include_path, args.tokenizer_model)
        options.check_output_file(args.save, overwrite=True, inputs=inputs)
    source = tasks.open_for_tasks(given, grid)
    if _uses_transformers(args.backend, source.format, world_size()):
        _tell(tasks.evaluate_by_transformers(source, given), args.save)
        return
    with process_groups(args, grid) as groups:
        found = tasks.evaluate_on_ranks(source, given, groups)
    if found is not None:
        _tell(found, args.save)


def _uses_transformers(backend: str, ckpt_format: str, processes: int) -> bool:
    if backend == "hf" and (ckpt_format != "hf" or processes > 1):
        raise ConfigError(
            f"--backend hf: takes a Hugging Face directory in one process, found {ckpt_format} in "
            f"{processes}; use --backend megatron, or convert --to hf"
        )
    return backend == "hf" or (backend == "auto" and ckpt_format == "hf" and processes == 1)


def _tell(found: dict[str, Any], save: Path | None) -> None:
    from megatron_prune.files import replace_file
    from megatron_prune.report.judged import task_scores

    shots = found["n-shot"]
    for name, (score, error) in task_scores(found).items():
        task = name.partition(",")[0]
        spread = "" if error is None else f" ± {error:.4f}"
        options.show(f"{name:<40} {score:.4f}{spread}  ({shots.get(task, 'n/a')}-shot)")
    if save is not None:
        text = json.dumps(found, indent=1, default=str) + "\n"
        replace_file(save, text.encode())
