"""Evaluate a checkpoint on a text that is checked and tokenised before the model is loaded."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from megatron_prune.data.windows import model_windows, scored_bytes
from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.model import ModelOptions, build_model, check_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.forward.windows import window_losses
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import DamagedError
from megatron_prune.evaluate.options import Bar, EvaluateOptions
from megatron_prune.evaluate.perplexity import judge
from megatron_prune.model.axes import count_parameters
from megatron_prune.sources.source import Source
from megatron_prune.sources.sparse import CountedSource
from megatron_prune.sources.sparsity_record import Sparsity, load_sparsity
from megatron_prune.store import open_source


def open_checked(options: EvaluateOptions) -> Source:
    """The model, opened and checked against the options; no weight is read.

    Raises:
        ConfigError: an option does not fit the model.
        ShapeError: the layout does not fit the model.
        CheckpointError: there is no model at ``load``.
    """
    source = open_source(options.load, family=options.family)
    options.grid.check(source.config.shape)
    run = ModelOptions.of(options, options.window_length)
    check_model(source.config, run, options.grid.tensor_parallel)
    return source


def _tokenise(options: EvaluateOptions, vocab_size: int) -> tuple[Tensor, int]:
    """The windows [windows, seq_length] int64 and the bytes their scored tokens decode to."""
    assert options.data is not None
    windows, tokenizer = model_windows(
        options.data,
        options.tokenizer_path,
        seq_length=options.window_length,
        max_windows=options.max_windows,
        vocab_size=vocab_size,
    )
    return windows, scored_bytes(tokenizer, windows)


def _zeros(record: Sparsity, counted: CountedSource, groups: Groups) -> dict[str, Any]:
    zeros, size = groups.sum_over_ranks(counted.zeros, counted.size)
    return {
        "sparsity": zeros / size if size else 0.0,
        "sparsity_method": record.how,
        "sparsity_pattern": record.pattern,
    }


def evaluate(source: Source, options: EvaluateOptions, groups: Groups, bar: Bar) -> dict[str, Any]:
    """Score the windows; the same result on every rank.

    ``seconds`` and ``tokens_per_second`` are of the scoring alone. Of a model that carries a record
    of zeros ``sparsity`` is the share of them that its matrices have now, counted as it is loaded:
    training may have changed them.

    Raises:
        ConfigError: the text or the tokenizer does not fit the model.
        DamagedError: the loss is not a number, or the record of zeros is none.
    """
    record = None if source.sparsity_path is None else load_sparsity(source.sparsity_path)
    windows, text_bytes = on_first_rank(
        groups.ranks, lambda: _tokenise(options, source.config.shape.vocab_size)
    )
    model = build_model(source.config, groups, ModelOptions.of(options, options.window_length))
    counted = CountedSource(source, () if record is None else record.tensors)
    load_weights(model, counted, groups)
    started = time.monotonic()
    with bar() as start:
        losses = window_losses(
            model,
            windows,
            groups,
            micro_batch_size=options.micro_batch_size,
            progress=start(len(windows)),
        )
    seconds = time.monotonic() - started
    if not bool(torch.isfinite(losses).all()):
        bad = int(torch.isfinite(losses).logical_not().nonzero()[0])
        raise DamagedError(
            f"{options.load}: the loss of window {bad} is {float(losses[bad])}; its weights hold "
            "values that are not finite, or --fp16 is too narrow for it"
        )
    judgement = judge(losses.tolist(), options.window_length - 1, text_bytes)
    return {
        **judgement.as_dict(),
        "seconds": seconds,
        "tokens_per_second": judgement.tokens / seconds,
        "parameters": count_parameters(source.config),
        **({} if record is None else _zeros(record, counted, groups)),
        "load": str(options.load),
        "data": str(options.data),
        "seq_length": options.window_length,
        "dtype": options.dtype,
        "tensor_model_parallel_size": groups.grid.tensor_parallel,
        "pipeline_model_parallel_size": groups.grid.pipeline_parallel,
        "data_parallel_size": groups.data_parallel,
    }
