"""Benchmark tasks of lm-evaluation-harness on any checkpoint.

Hugging Face directories go to the harness' own backend, Megatron checkpoints run under TP, PP and
DP here, with the same scores. Tasks and their data are looked up before a weight is read.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from typing import Any

import torch

from megatron_prune.data.tokenizers import chat_tokenizer, transformers_tokenizer
from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.model import ModelOptions, build_model, check_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.generation import stop_tokens
from megatron_prune.evaluate.options import EvaluateOptions
from megatron_prune.evaluate.served import SharedModel
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.tensors import torch_dtype
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source

_MERGED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def wanted_tasks(options: EvaluateOptions) -> dict[str, int | None]:
    """``--tasks a,b:25`` -> a with ``--num-fewshot`` examples before each question, b with 25;
    None leaves it to the task.

    Raises:
        ConfigError: not a number of examples, a task twice, or none.
    """
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ConfigError(f"--num-fewshot {options.num_fewshot}; wanted 0 or more")
    tasks: dict[str, int | None] = {}
    for text in (text.strip() for word in options.tasks for text in word.split(",")):
        name, colon, shots = text.partition(":")
        if not name or (colon and not shots.isdecimal()):
            raise ConfigError(f"--tasks {text!r}: wanted NAME or NAME:EXAMPLES, such as boolq:32")
        if name in tasks:
            raise ConfigError(f"--tasks: {name} stands twice; name each task once")
        tasks[name] = int(shots) if colon else options.num_fewshot
    return tasks


def check_harness() -> None:
    """Raises:
    ConfigError: lm-evaluation-harness is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness, which is not installed; "
            "pip install 'megatron_prune[eval]'"
        )


def open_for_tasks(options: EvaluateOptions) -> Source:
    """The model, opened and checked; no weight is read.

    Raises:
        PruneError: an option or the layout does not fit the model, or there is none.
    """
    source = open_source(options.load, family=options.family)
    source.config.shape.check_uniform("evaluate --tasks", "--data judges it")
    options.grid.check(source.config.shape)
    check_model(source.config, ModelOptions.of(options, _length(source, options, options.grid)), 1)
    if options.apply_chat_template:
        chat_tokenizer(options.tokenizer_path)
    return source


def _length(source: Source, options: EvaluateOptions, grid: ParallelGrid) -> int:
    """Positions to use, divisible for sequence parallelism."""
    config = source.config
    most = min(config.max_position_embeddings, config.sliding_window or 1 << 60)
    length = most if options.seq_length is None else options.seq_length
    if length > most:
        raise ConfigError(f"--seq-length {length} is more than the {most} positions of the model")
    parts = grid.tensor_parallel if options.sequence_parallel else 1
    return length // parts * parts


def _load_tasks(options: EvaluateOptions) -> Any:
    """The harness' task manager, after every task and its data have been found once.

    Raises:
        ConfigError: an unknown task, or data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = options.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--include-path {folder}: is no directory; wanted one of task files")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    wanted = wanted_tasks(options)
    unknown = [name for name in wanted if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks {', '.join(unknown)}: unknown to lm-evaluation-harness; see 'lm-eval ls "
            "tasks', or name the folder of your own with --include-path"
        )
    for name in wanted:
        try:
            manager.load([name])
        except Exception as error:  # whatever the libraries of data sets raise
            said = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"--tasks {name}: its data cannot be read ({type(error).__name__}: {said}); fetch "
                "it where there is a network, or set HF_HOME to where it lies"
            ) from error
    return manager


def _evaluate(model: Any, manager: Any, options: EvaluateOptions) -> dict[str, Any]:
    """Results of all tasks; one call of the harness for each number of examples."""
    from lm_eval import simple_evaluate

    found: dict[str, Any] = {name: {} for name in _MERGED}
    wanted = wanted_tasks(options)
    for shots in dict.fromkeys(wanted.values()):
        results = simple_evaluate(
            model=model,
            tasks=[name for name, asked in wanted.items() if asked == shots],
            num_fewshot=shots,
            limit=options.limit,
            task_manager=manager,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template,
            log_samples=False,
        )
        for name in _MERGED:
            found[name].update(results.get(name) or {})
    return found


def _facts(
    source: Source, options: EvaluateOptions, backend: str, seconds: float
) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "load": str(options.load),
        "parameters": count_parameters(source.config),
        "backend": backend,
        "dtype": options.dtype,
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template,
        "lm_eval": version("lm_eval"),
        "seconds": seconds,
    }


def evaluate_by_transformers(source: Source, options: EvaluateOptions) -> dict[str, Any]:
    """The tasks on a Hugging Face directory, by the harness' own backend, in this process.

    Raises:
        ConfigError: see `_load_tasks`.
    """
    manager = _load_tasks(options)
    from lm_eval.models.huggingface import HFLM

    began = time.monotonic()
    model = HFLM(
        pretrained=str(source.path),
        tokenizer=None if options.tokenizer_model is None else str(options.tokenizer_model),
        dtype=torch_dtype(options.dtype),
        batch_size=options.micro_batch_size,
        device="cuda" if torch.cuda.is_available() else "cpu",
        max_length=_length(source, options, ParallelGrid()),
        trust_remote_code=False,
    )
    found = _evaluate(model, manager, options)
    return {**_facts(source, options, "hf", time.monotonic() - began), **found}


def evaluate_on_ranks(
    source: Source, options: EvaluateOptions, groups: Groups
) -> dict[str, Any] | None:
    """The tasks on any checkpoint under TP, PP and DP; results on the first rank.

    Raises:
        ConfigError: see `_load_tasks`.
        DistributedError: another rank met an error.
    """
    groups.ranks.agree("the tasks", repr(options))
    managers: list[Any] = []
    on_first_rank(groups.ranks, lambda: managers.append(_load_tasks(options)))
    began = time.monotonic()
    length = _length(source, options, groups.grid)
    tokenizer = transformers_tokenizer(options.tokenizer_path)
    if len(tokenizer) > source.config.shape.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, the model a vocabulary of "
            f"{source.config.shape.vocab_size}; give the model's own with --tokenizer-model"
        )
    model = build_model(source.config, groups, ModelOptions.of(options, length))
    load_weights(model, source, groups)
    ends = stop_tokens(source, tokenizer.eos_token_id)
    shared = SharedModel(model, groups, tokenizer, ends, micro_batch_size=options.micro_batch_size)
    if not groups.ranks.is_first:
        shared.serve()
        return None
    from megatron_prune.evaluate.harness_model import SharedModelLM

    try:
        found = _evaluate(SharedModelLM(shared, tokenizer, max_length=length), managers[0], options)
    except Exception as error:
        shared.stop(error)
        raise
    shared.stop()
    facts = _facts(source, options, "megatron", time.monotonic() - began)
    layout = {
        "tensor_model_parallel_size": groups.grid.tensor_parallel,
        "pipeline_model_parallel_size": groups.grid.pipeline_parallel,
        "data_parallel_size": groups.data_parallel,
    }
    return {**facts, **layout, **found}
