"""Continued pretraining: the loop and what surrounds it.

The order of a run: decide where it starts, check everything a user has given, build the model, load
the weights once, train. Every step ends with one small exchange between all ranks: the loss, and
whether one of them has been asked to stop; so all ranks save and leave after the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.data.sidecar import CorpusFacts
from megatron_prune.engine.checkpoint import (
    Start,
    find_start,
    load_checkpoint,
    save_checkpoint,
)
from megatron_prune.engine.corpora import build_datasets, check_corpora, clean_cache, microbatches
from megatron_prune.engine.failures import on_first_rank, together
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.metrics import MetricsLog, record_command
from megatron_prune.engine.model import ModelOptions, build_model, check_model
from megatron_prune.engine.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate,
    load_optimizer,
    load_scheduler,
    prepare_to_load,
    wrap_model,
)
from megatron_prune.engine.options import TrainOptions
from megatron_prune.engine.signals import StopSignals
from megatron_prune.engine.weights import draw_weights, load_weights
from megatron_prune.errors import DamagedError, Interrupted
from megatron_prune.source import CastSource, Source
from megatron_prune.store import open_source
from megatron_prune.store.passenger import Passenger

_SKIPPED_STEPS_MAX = 50  # fp16: halving the loss scale from 2**32 to 1 takes 33 steps


def model_options(options: TrainOptions) -> ModelOptions:
    return ModelOptions(
        seq_length=options.seq_length,
        dtype=options.dtype,
        transformer_impl=options.transformer_impl,
        sequence_parallel=options.sequence_parallel,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
    )


def open_start(options: TrainOptions, groups: Groups) -> tuple[Start, Source, list[CorpusFacts]]:
    """Where the run starts, its model opened, its corpora checked; no weight is read.

    Raises:
        PruneError: whatever a user has given and cannot be used.
    """
    groups.ranks.agree("the command line", repr(options))
    start = on_first_rank(groups.ranks, lambda: find_start(options))
    source = together(groups.ranks, lambda: open_source(start.directory, family=options.family))
    source.config.shape.check_uniform("train", "prune without --nonuniform")
    groups.grid.check(source.config.shape)
    check_model(source.config, model_options(options), groups.grid.tensor_parallel)
    tokenizer = tokenizer_of(options, source, start)
    facts = on_first_rank(
        groups.ranks,
        lambda: check_corpora(options, tokenizer, source.config.shape.vocab_size),
    )
    return start, source, facts


def tokenizer_of(options: TrainOptions, source: Source, start: Start) -> Path | None:
    """Where the tokenizer lies that the corpora must have been made with; None when unknown."""
    if options.tokenizer_model is not None:
        return options.tokenizer_model
    return start.directory if any("token" in name for name in source.companion_files) else None


class Training:
    """One run: its model, optimizer, data and how far it has come."""

    def __init__(
        self,
        options: TrainOptions,
        groups: Groups,
        start: Start,
        source: Source,
        facts: Sequence[CorpusFacts],
    ) -> None:
        self.options, self.groups, self.config = options, groups, source.config
        self.passenger = Passenger.of(CastSource(source, options.dtype))
        self.iteration, self.consumed = 0, 0
        self.validated_at, self.saved_at = 0, None if start.state is None else start.iteration
        self._losses: list[float] = []  # since the last logged iteration
        self._skipped = 0
        self._at = self._batch = 0  # of the step under way: its iteration and its samples
        self._build_data(facts)
        self._build_model(start, source)
        source.close()

    def _build_data(self, facts: Sequence[CorpusFacts]) -> None:
        options = self.options
        copies = self.groups.data_parallel
        samples = (
            options.samples_after(options.train_iters, copies),
            options.eval_iters * options.batch_size(copies),
        )
        # rank 0 clears what a kill has cut short before any rank looks into the cache
        on_first_rank(self.groups.ranks, lambda: clean_cache(options.cache_path))
        self.train_data, self.valid_data = build_datasets(
            options, facts, samples, self.config.shape.vocab_size
        )

    def _build_model(self, start: Start, source: Source) -> None:
        options, groups = self.options, self.groups
        self.model = build_model(self.config, groups, model_options(options))
        if start.state is None and options.init_random:
            draw_weights(self.model, self.config, groups, options.seed)
        elif start.state is None:
            load_weights(self.model, source, groups)
        self.ddp = wrap_model(self.model, options)
        self.optimizer = build_optimizer(self.ddp, options)
        self.scheduler = build_scheduler(self.optimizer, options, groups.data_parallel)
        if start.state is not None:
            self._continue(start)

    def _continue(self, start: Start) -> None:
        """Take up a saved run."""
        options, state = self.options, start.state
        assert state is not None
        optimizer = None if options.no_load_optim else self.optimizer
        if optimizer is not None:
            prepare_to_load(optimizer)
        saved, schedule = load_checkpoint(
            start, options, self.groups, model=self.model, optimizer=optimizer
        )
        self.iteration, self.consumed = state["iteration"], state["consumed_samples"]
        self.validated_at = state["validated_at"]
        self._losses = list(state["losses"])
        if saved is not None:
            load_optimizer(self.optimizer, saved)
            load_scheduler(self.scheduler, schedule, options)
        else:
            self.optimizer.reload_model_params()
            self.scheduler.step(self.consumed)

    def state(self) -> dict[str, Any]:
        """What the next run continues with; plain types only."""
        return {
            "iteration": self.iteration,
            "consumed_samples": self.consumed,
            "validated_at": self.validated_at,
            "losses": list(self._losses),
            "dtype": self.options.dtype,
            "use_distributed_optimizer": self.options.use_distributed_optimizer,
        }

    # ---- one step ----------------------------------------------------------------------------

    def _run(self, data: Iterator[Any] | None, count: int, *, forward_only: bool) -> float:
        """Forward and backward over ``count`` microbatches; this rank's share of the mean loss.

        Shares of all ranks sum to the mean over microbatches and data-parallel ranks.
        """
        options, groups = self.options, self.groups

        def forward(data: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            tokens, labels, mask = next(data)
            losses = model(tokens, None, None, labels=labels)

            def loss(losses_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                mean = (losses_bs * mask).sum() / mask.sum().clamp(min=1)
                return mean, {"lm loss": mean.detach().clone()}

            return losses, loss

        def forward_inside(_: Any, model: Any) -> tuple[Tensor, Any]:
            return model(None, None, None), None  # a stage that sees no tokens

        is_inside = not (groups.is_first_stage or groups.is_last_stage)
        found = get_forward_backward_func()(
            forward_step_func=forward_inside if is_inside else forward,
            data_iterator=data,
            model=self.ddp,
            num_microbatches=count,
            seq_length=options.seq_length,
            micro_batch_size=options.micro_batch_size,
            forward_only=forward_only,
        )
        if not found:
            return 0.0
        total = sum(float(one["lm loss"]) for one in found)
        return total / count / groups.data_parallel / groups.grid.tensor_parallel

    def _sum_over_ranks(self, *values: float) -> list[float]:
        exchanged = torch.tensor(values, dtype=torch.float64, device=self.groups.device)
        dist.all_reduce(exchanged)
        summed: list[float] = exchanged.tolist()
        return summed

    def step(self, signals: StopSignals) -> tuple[float, float | None, bool]:
        """One iteration: the loss, the gradient norm (None when fp16 skipped), stop asked for.

        Raises:
            DamagedError: loss or gradient is not a number; nothing has been saved since.
        """
        self._at = self.iteration + 1
        self.ddp.train()
        batch = self._batch = self.options.batch_size_after(
            self.consumed, self.groups.data_parallel
        )
        count = batch // (self.options.micro_batch_size * self.groups.data_parallel)
        data = microbatches(
            self.train_data, self.consumed, count, self.options.micro_batch_size, self.groups
        )
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        share = self._run(data, count, forward_only=False)
        loss, stops = self._sum_over_ranks(share, float(signals.received is not None))
        self._refuse_nonfinite("lm loss", loss)
        succeeded, norm, _ = self.optimizer.step()
        if succeeded and norm is not None:
            self._refuse_nonfinite("gradient norm", float(norm))
        if succeeded:
            self.scheduler.step(batch)
        self._count_skipped(bool(succeeded))
        self.iteration += 1
        self.consumed += batch
        return loss, float(norm) if succeeded and norm is not None else None, stops > 0

    def _count_skipped(self, succeeded: bool) -> None:
        self._skipped = 0 if succeeded else self._skipped + 1
        if self._skipped > _SKIPPED_STEPS_MAX:
            self._stop_for("gradient is infinite, on every one of the last steps")

    def _refuse_nonfinite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            self._stop_for(f"{what} is {value}")

    def _stop_for(self, what: str) -> None:
        kept = "nothing is saved" if self.saved_at is None else f"iteration {self.saved_at} is kept"
        raise DamagedError(
            f"iteration {self._at}: {what}; stopped, {kept}. Look for values "
            "that are not finite in the starting weights, lower --lr, or raise --lr-warmup-iters"
        )

    # ---- the loop ----------------------------------------------------------------------------

    def validate(self, log: MetricsLog) -> None:
        """Loss on the first ``--eval-iters`` batches of the validation part: always the same."""
        options, groups = self.options, self.groups
        count = options.batch_size(groups.data_parallel) // (
            options.micro_batch_size * groups.data_parallel
        )
        self.ddp.eval()
        share = 0.0
        with torch.no_grad():
            for index in range(options.eval_iters):
                first = index * options.batch_size(groups.data_parallel)
                data = microbatches(self.valid_data, first, count, options.micro_batch_size, groups)
                share += self._run(data, count, forward_only=True)
        (loss,) = self._sum_over_ranks(share / options.eval_iters)
        self.validated_at = self.iteration
        log.validation(self.iteration, self.consumed, loss)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _must_validate(self) -> bool:
        last = self.iteration == self.options.train_iters
        due = self.iteration > 0 and (self._is_due(self.options.eval_interval) or last)
        return bool(self.options.eval_iters) and due and self.validated_at != self.iteration

    def save(self, log: MetricsLog) -> None:
        if self.saved_at == self.iteration:
            return
        began = time.monotonic()
        wrong = sum(not bool(p.isfinite().all()) for p in self.model.parameters())
        (wrong_everywhere,) = self._sum_over_ranks(float(wrong))
        if wrong_everywhere:
            self._stop_for(f"{wrong_everywhere:.0f} parameters hold values that are not finite")
        log.sync()
        path = save_checkpoint(
            self.options,
            self.groups,
            self.passenger,
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            state=self.state(),
        )
        self.saved_at = self.iteration
        log.say(f"saved {path} in {time.monotonic() - began:.1f} s")

    def run(self) -> None:
        """Train to ``--train-iters``, or to the exit interval, or to a signal.

        Raises:
            Interrupted: after a signal, everything saved.
        """
        options = self.options
        active = self.groups.ranks.is_first
        if active:
            options.save.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(
            options.save,
            options.tensorboard_path,
            start=self.iteration,
            train_iters=options.train_iters,
            active=active,
        )
        try:
            with StopSignals() as signals:
                self._loop(log, signals)
        finally:
            log.close()

    def _loop(self, log: MetricsLog, signals: StopSignals) -> None:
        options = self.options
        if self._must_validate():  # the run before was stopped between step and validation
            self.validate(log)
        lapse = _Lapse(self.consumed)
        while self.iteration < options.train_iters:
            rate = learning_rate(self.optimizer)
            loss, norm, stop = self.step(signals)
            self._losses.append(loss)
            log.advance()
            if self._is_due(options.log_interval):
                self._log(log, rate, norm, lapse)
            if not stop and self._must_validate():
                self.validate(log)
                lapse.restart(self.consumed)
            leave = self._is_due(options.exit_interval)
            if stop or leave or self._is_due(options.save_interval) or self._is_done():
                self.save(log)
                lapse.restart(self.consumed)
            if stop:
                raise Interrupted(
                    f"stopped by {signals.received or 'a signal to another rank'} after iteration "
                    f"{self.iteration}, which is saved; the same command continues"
                )
            if leave:
                return

    def _is_done(self) -> bool:
        return self.iteration == self.options.train_iters

    def _log(self, log: MetricsLog, rate: float, norm: float | None, lapse: _Lapse) -> None:
        seconds, samples = lapse.take(self.consumed)
        steps, self._losses = self._losses, []
        log.training(
            {
                "iteration": self.iteration,
                "lm loss": sum(steps) / len(steps),
                "learning-rate": rate,
                "grad-norm": norm,
                "loss-scale": float(self.optimizer.get_loss_scale()),
                "batch-size": self._batch,
                "consumed-samples": self.consumed,
                "consumed-tokens": self.consumed * self.options.seq_length,
                "seconds": seconds / len(steps),
                "tokens-per-second": samples * self.options.seq_length / seconds,
            }
        )


class _Lapse:
    """Time and samples since the last logged iteration, without validation and saving."""

    def __init__(self, consumed: int) -> None:
        self.restart(consumed)

    def restart(self, consumed: int) -> None:
        self._since, self._from = time.monotonic(), consumed

    def take(self, consumed: int) -> tuple[float, int]:
        now = time.monotonic()
        seconds, samples = max(now - self._since, 1e-9), consumed - self._from
        self.restart(consumed)
        return seconds, samples


def train(options: TrainOptions, groups: Groups, command: Sequence[str] = ()) -> None:
    """Check everything, then train.

    Args:
        command: what the user typed, to be recorded.

    Raises:
        PruneError: whatever cannot be used, before the first weight is read.
        Interrupted: after a signal, everything saved.
    """
    start, source, facts = open_start(options, groups)
    training = Training(options, groups, start, source, facts)
    if groups.ranks.is_first:
        processes = groups.ranks.world_size
        record_command(options.save, command, iteration=training.iteration, processes=processes)
    training.run()
