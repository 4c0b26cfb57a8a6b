"""Continued pretraining: the loop and what surrounds it.

The order of a run: decide where it starts, check everything a user has given, build the model, load
the weights once, train. Every step ends with one small exchange between all ranks: the loss, and
whether one of them has been asked to stop; so all ranks save and leave after the same step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor
from tqdm import tqdm

from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.lora import start_factors
from megatron_prune.engine.forward.model import build_model
from megatron_prune.engine.forward.weights import draw_weights, load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.distillation import Distillation
from megatron_prune.engine.train.checkpoint import (
    Start,
    find_start,
    load_checkpoint,
)
from megatron_prune.engine.train.corpora import build_datasets, clean_cache, microbatches
from megatron_prune.engine.train.domains import DomainLoading
from megatron_prune.engine.train.guard import StepGuard
from megatron_prune.engine.train.inputs import RunInputs, model_options, open_inputs
from megatron_prune.engine.train.metrics import Lapse, MetricsLog, record_command
from megatron_prune.engine.train.optimizer import (
    build_optimizer,
    build_scheduler,
    learning_rate,
    load_optimizer,
    load_scheduler,
    prepare_to_load,
    step_optimizer,
    wrap_model,
)
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.engine.train.run_lock import only_writer
from megatron_prune.engine.train.saving import Saver
from megatron_prune.engine.train.signals import StopSignals
from megatron_prune.errors import DamagedError, Interrupted
from megatron_prune.sources.source import CastSource
from megatron_prune.store.passenger import Passenger

_SKIPPED_STEPS_MAX = 50  # fp16: halving the loss scale from 2**32 to 1 takes 33 steps


class Training:
    """One run: its model, optimizer, data and how far it has come."""

    distillation: Distillation | None = None

    def __init__(self, options: TrainOptions, groups: Groups, inputs: RunInputs) -> None:
        start, source = inputs.start, inputs.source
        self.options, self.groups, self.config = options, groups, source.config
        self.passenger = Passenger.of(CastSource(source, options.dtype))
        self.iteration, self.consumed = 0, 0
        self.validated_at, self.saved_at = 0, None if start.state is None else start.iteration
        self.saver = Saver(options, groups, self.passenger, say=self._say)
        self._all_written = True
        self._losses: list[float] = []  # since the last logged iteration
        self._skipped = 0  # in a row, by fp16's loss scale
        self.guard = StepGuard(options, None if start.state is None else start.state.get("guard"))
        self._at = self._batch = 0  # of the step under way: its iteration and its samples
        self._build_data(inputs)
        self._build_model(inputs)
        source.close()

    def _build_data(self, inputs: RunInputs) -> None:
        options, facts = self.options, inputs.facts
        copies = self.groups.data_parallel
        samples = (
            options.samples_after(options.train_iters, copies),
            options.eval_iters * options.batch_size(copies),
        )
        # rank 0 clears what a kill has cut short before any rank looks into the cache
        on_first_rank(self.groups.ranks, lambda: clean_cache(options.cache_path))
        self.domains: DomainLoading | None = None
        if options.domains is not None:
            self.domains = DomainLoading(
                options, self.groups, self.config, facts, inputs.start.state
            )
            self.train_data, self.valid_data = self.domains.train_data, None
            return
        self.train_data, self.valid_data = build_datasets(
            options, facts, samples, self.config.shape.vocab_size
        )

    def _build_model(self, inputs: RunInputs) -> None:
        options, groups, start = self.options, self.groups, inputs.start
        built_as = model_options(options)
        self.model = build_model(self.config, groups, built_as)
        if start.state is None and options.init_random:
            draw_weights(self.model, self.config, groups, options.seed)
        elif start.state is None:
            load_weights(self.model, inputs.source, groups)
        if options.lora is not None:
            start_factors(self.model, self.config, groups, options.seed)
        if options.distill is not None:
            self.distillation = Distillation(
                options.distill, built_as, groups, inputs.teachers, self.model, options.seed
            )
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
        if self.distillation is not None:
            self.distillation.load(state)
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
            "domains": None if self.domains is None else self.domains.state(self.consumed),
            **({} if self.distillation is None else self.distillation.state()),
            "guard": self.guard.state(),
            "dtype": self.options.dtype,
            "use_distributed_optimizer": self.options.use_distributed_optimizer,
        }

    # ---- one step ----------------------------------------------------------------------------

    def _run(self, data: Iterator[Any] | None, count: int, *, forward_only: bool) -> float:
        """Forward and backward over ``count`` microbatches; this rank's share of the mean loss.

        Shares of all ranks sum to the mean over microbatches and data-parallel ranks.
        """
        options, groups, distillation = self.options, self.groups, self.distillation
        if distillation is not None and data is not None and not forward_only:
            data = distillation.beside(data, count, options.micro_batch_size)

        def forward(data: Iterator[Any], model: Any) -> tuple[Tensor, Any]:
            tokens, labels, mask, counted, *taught = next(data)
            if distillation is not None and taught:
                distillation.teach(*taught)
            losses = model(tokens, None, None, labels=labels)

            def loss(losses_bs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                mean = (losses_bs * mask).sum() / counted  # this rank's share of it
                if distillation is not None and taught:
                    return distillation.loss(mean, mask, counted)
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
        if distillation is not None and not forward_only:
            ranks = groups.data_parallel * groups.grid.tensor_parallel
            distillation.keep_shares(found, count * ranks)
        total = sum(float(one["lm loss"]) for one in found)
        return total / count / groups.data_parallel / groups.grid.tensor_parallel

    def _sum_over_ranks(self, *values: float) -> list[float]:
        exchanged = torch.tensor(values, dtype=torch.float64, device=self.groups.device)
        dist.all_reduce(exchanged)
        summed: list[float] = exchanged.tolist()
        return summed

    def step(self, signals: StopSignals) -> tuple[float, float | None, bool]:
        """One iteration: the loss, the gradient norm (None when skipped), stop asked for.

        Raises:
            DamagedError: more wrong steps in a row than may be skipped; none has been applied.
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
        told = () if self.distillation is None else self.distillation.shares
        loss, stops, writing, *taught = self._sum_over_ranks(
            share, float(signals.received is not None), float(self.saver.is_writing), *told
        )
        self._all_written = not writing
        norm = self._apply(loss, taught)
        if norm is not None:
            self.scheduler.step(batch)
        self.iteration += 1
        self.consumed += batch
        return loss, norm, stops > 0

    def _apply(self, loss: float, taught: Sequence[float]) -> float | None:
        """Change the weights unless the step is wrong; the gradient norm, None when skipped."""
        wrong, norm = self.guard.wrong_loss(loss), None
        if self.distillation is not None:
            wrong = wrong or self.distillation.advance(taught)
        if wrong is None:
            norm = step_optimizer(self.optimizer, lambda norm: self._sum_over_ranks(norm)[0])
            self._count_skipped(norm is not None)
            if norm is not None and not math.isfinite(norm):
                wrong, norm = f"gradient norm is {norm}", None
        if self.guard.count(wrong, loss):
            self._stop_for(f"{wrong}; {self.guard.in_a_row} such steps in a row")
        if wrong is not None:
            self._say(f"iteration {self._at}: {wrong}; skipped")
        return norm

    def _say(self, text: str) -> None:
        if self.groups.ranks.is_first:
            tqdm.write(text, file=sys.stderr)

    def _count_skipped(self, succeeded: bool) -> None:
        self._skipped = 0 if succeeded else self._skipped + 1
        if self._skipped > _SKIPPED_STEPS_MAX:
            self._stop_for("gradient is infinite, on every one of the last steps")

    def _stop_for(self, what: str) -> None:
        self._finish_save()
        kept = "nothing is saved" if self.saved_at is None else f"iteration {self.saved_at} is kept"
        raise DamagedError(
            f"iteration {self._at}: {what}; stopped, {kept}. Look for values "
            "that are not finite in the starting weights, lower --lr, raise --lr-warmup-iters, or "
            "let single steps go with --skip-nonfinite"
        )

    # ---- the loop ----------------------------------------------------------------------------

    def validate(self, log: MetricsLog) -> None:
        """Loss on the first ``--eval-iters`` batches of the validation part: always the same."""
        if self.domains is None:
            loss = self._validation_loss()
        else:
            loss = self.domains.validate(self.model, log, self.iteration, self.consumed)
        self.validated_at = self.iteration
        log.validation(self.iteration, self.consumed, loss)

    def _validation_loss(self) -> float:
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
        return loss

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _must_validate(self) -> bool:
        last = self.iteration == self.options.train_iters
        due = self._is_due(self.options.eval_interval) or last
        due = due or (self.domains is not None and self.domains.is_due(self.iteration))
        due = due and self.iteration > 0
        return bool(self.options.eval_iters) and due and self.validated_at != self.iteration

    def save(self, log: MetricsLog) -> None:
        """Begin to save this iteration, once the save before is done."""
        if self.iteration in (self.saved_at, self.saver.iteration):
            return
        self._finish_save()
        wrong = sum(not bool(p.isfinite().all()) for p in self.model.parameters())
        (wrong_everywhere,) = self._sum_over_ranks(float(wrong))
        if wrong_everywhere:
            self._stop_for(f"{wrong_everywhere:.0f} parameters hold values that are not finite")
        log.sync()
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.saver.begin(self.state(), **parts)
        if not self.options.async_save:
            self._finish_save()

    def _finish_save(self) -> None:
        done = self.saver.finish()
        self.saved_at = self.saved_at if done is None else done

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
            self.saver.abandon()
            log.close()

    def _loop(self, log: MetricsLog, signals: StopSignals) -> None:
        options = self.options
        if self._must_validate():  # the run before was stopped between step and validation
            self.validate(log)
        lapse = Lapse(self.consumed)
        while self.iteration < options.train_iters:
            rate = learning_rate(self.optimizer)
            loss, norm, stop = self.step(signals)
            self._losses.append(loss)
            log.advance()
            if self._all_written:
                self._finish_save()
            if self._is_due(options.log_interval):
                self._log(log, rate, norm, lapse)
            if self.domains is not None:
                self.domains.tell_epochs(log, self.consumed)
            if not stop and self._must_validate():
                self.validate(log)
                lapse.restart(self.consumed)
            leave = self._is_due(options.exit_interval)
            if stop or leave or self._is_due(options.save_interval) or self._is_done():
                self.save(log)
                lapse.restart(self.consumed)
            if stop or leave or self._is_done():
                self._finish_save()
            if stop:
                raise Interrupted(
                    f"stopped by {signals.received or 'a signal to another rank'} after iteration "
                    f"{self.iteration}, which is saved; the same command continues"
                )
            if leave:
                return

    def _is_done(self) -> bool:
        return self.iteration == self.options.train_iters

    def _log(self, log: MetricsLog, rate: float, norm: float | None, lapse: Lapse) -> None:
        seconds, samples = lapse.take(self.consumed)
        steps, self._losses = self._losses, []
        finite = [loss for loss in steps if math.isfinite(loss)]
        log.training(
            {
                "iteration": self.iteration,
                "lm loss": sum(finite) / len(finite) if finite else None,
                **({} if self.distillation is None else self.distillation.take_means()),
                "learning-rate": rate,
                "grad-norm": norm,
                "loss-scale": float(self.optimizer.get_loss_scale()),
                "skipped-iterations": self.guard.take_skipped(),
                "batch-size": self._batch,
                "consumed-samples": self.consumed,
                "consumed-tokens": self.consumed * self.options.seq_length,
                "seconds": seconds / len(steps),
                "tokens-per-second": samples * self.options.seq_length / seconds,
            }
        )


def train(options: TrainOptions, groups: Groups, command: Sequence[str] = ()) -> None:
    """Check everything, then train.

    Args:
        command: what the user typed, to be recorded.

    Raises:
        PruneError: whatever cannot be used, before the first weight is read.
        Interrupted: after a signal, everything saved.
    """
    inputs = open_inputs(options, groups)
    with only_writer(options.save, groups.ranks):
        if on_first_rank(groups.ranks, lambda: find_start(options, mend=False)) != inputs.start:
            inputs.close()
            inputs = open_inputs(options, groups)  # a run has just ended there
        training = Training(options, groups, inputs)
        if groups.ranks.is_first:
            processes = groups.ranks.world_size
            record_command(options.save, command, iteration=training.iteration, processes=processes)
        training.run()
