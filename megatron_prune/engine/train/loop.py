"""Continued pretraining: the loop and what surrounds it.

The order of a run: decide where it starts, check everything a user has given, build the model, load
the weights once, train. Every step ends with one small exchange between all ranks: the loss, and
whether one of them has been asked to stop; so all ranks save and leave after the same step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from megatron_prune.engine.failures import on_first_rank
from megatron_prune.engine.forward.lora import start_factors
from megatron_prune.engine.forward.microbatches import forward_backward, microbatches
from megatron_prune.engine.forward.model import build_model
from megatron_prune.engine.forward.weights import draw_weights, load_weights
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.distillation import Distillation
from megatron_prune.engine.objectives.objective import LM_LOSS, LanguageModelLoss, Objective
from megatron_prune.engine.train.checkpoint import (
    Start,
    find_start,
    load_checkpoint,
    taking_up,
)
from megatron_prune.engine.train.corpora import clean_cache
from megatron_prune.engine.train.domains import DomainLoading
from megatron_prune.engine.train.guard import StepGuard
from megatron_prune.engine.train.inputs import RunInputs, model_options, open_inputs
from megatron_prune.engine.train.metrics import Lapse, MetricsLog, StepLosses, record_command
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
from megatron_prune.engine.train.samples import BlendedSamples, Samples, step_of
from megatron_prune.engine.train.saving import Saver
from megatron_prune.engine.train.signals import StopSignals
from megatron_prune.engine.train.zeros import KeptZeros
from megatron_prune.errors import DamagedError, Interrupted
from megatron_prune.sources.source import CastSource
from megatron_prune.store.passenger import Passenger

_SKIPPED_STEPS_MAX = 50  # fp16: halving the loss scale from 2**32 to 1 takes 33 steps


Wrap = Callable[[Objective, RunInputs, Groups], Objective]
"""What is minimised in the place of what the options alone ask for, and may be made of it."""


def choose_guests(
    options: TrainOptions, groups: Groups, inputs: RunInputs
) -> tuple[Objective, Samples]:
    """What the options ask for: what is minimised, and on what."""
    objective: Objective = LanguageModelLoss()
    if options.distill is not None:
        run, teachers = model_options(options), inputs.teachers
        objective = Distillation(options.distill, run, groups, teachers, options.seed)
    config, facts = inputs.source.config, inputs.facts
    # rank 0 clears what a kill has cut short before any rank looks into the cache
    on_first_rank(groups.ranks, lambda: clean_cache(options.cache_path))
    if options.domains is not None:
        return objective, DomainLoading(options, groups, config, facts, inputs.start.state)
    return objective, BlendedSamples(options, groups, facts, config.shape.vocab_size)


class Training:
    """One run: its model, optimizer, objective, samples, and how far it has come."""

    def __init__(
        self,
        options: TrainOptions,
        groups: Groups,
        inputs: RunInputs,
        wrap: Wrap | None = None,
    ) -> None:
        start, source = inputs.start, inputs.source
        state = start.state or {}
        self.options, self.groups, self.config = options, groups, source.config
        self.passenger = Passenger.of(CastSource(source, options.dtype))
        self.iteration, self.consumed = state.get("iteration", 0), state.get("consumed_samples", 0)
        self.validated_at = state.get("validated_at", 0)
        self.saved_at = None if start.state is None else start.iteration
        self.saver = Saver(options, groups, self.passenger, say=self._say)
        self._all_written = True
        self._skipped = 0  # in a row, by fp16's loss scale
        self._beside = 0.0  # the norm of the objective's own gradients
        self._at = self._batch = 0  # of the step under way: its iteration and its samples
        with taking_up(start):
            chosen, self.samples = choose_guests(options, groups, inputs)
            self.objective = chosen if wrap is None else wrap(chosen, inputs, groups)
            self.losses = StepLosses(self.objective.names, state)
            self.guard = StepGuard(options, state.get("guard"))
        self._build_model(inputs)
        source.close()

    def _build_model(self, inputs: RunInputs) -> None:
        options, groups, start = self.options, self.groups, inputs.start
        fresh = options.init_random or options.finetune
        if start.state is None and not fresh and inputs.source.format != "hf":
            beside = "; the optimizer's is not of this program" * inputs.source.has_optimizer_state
            self._say(
                f"{start.directory}: holds no training state to continue{beside}; its weights "
                "begin a new run at step 1"
            )
        self.model = build_model(self.config, groups, model_options(options))
        if start.state is None and options.init_random:
            draw_weights(self.model, self.config, groups, options.seed)
        elif start.state is None:
            load_weights(self.model, inputs.source, groups)
        if options.lora is not None:
            start_factors(self.model, self.config, groups, options.seed)
        self.objective.attach(self.model)
        self.ddp = wrap_model(self.model, options)
        freezes = self.objective.freezes
        self.optimizer = build_optimizer(self.ddp, options, freezes=freezes)
        self.scheduler = build_scheduler(self.optimizer, options, groups.data_parallel)
        if start.state is not None:
            with taking_up(start):
                self._continue(start)
        self._hold: Callable[[], None] | None = None
        if options.keep_zeros and not freezes:
            kept = KeptZeros(self.model, self.optimizer)
            self._say(kept.told(groups, is_split=options.use_distributed_optimizer))
            self._hold = kept.hold

    def _continue(self, start: Start) -> None:
        """Take up the weights, the optimizer's state and the schedule of a saved run."""
        options = self.options
        optimizer = None if options.no_load_optim else self.optimizer
        if optimizer is not None:
            prepare_to_load(optimizer)
        saved, schedule = load_checkpoint(
            start, options, self.groups, model=self.model, optimizer=optimizer
        )
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
            **self.losses.state(),
            **self.samples.state(self.consumed),
            **self.objective.state(),
            "guard": self.guard.state(),
            "dtype": self.options.dtype,
            "use_distributed_optimizer": self.options.use_distributed_optimizer,
            **({"keep_zeros": True} if self.options.keep_zeros else {}),
        }

    # ---- one step ----------------------------------------------------------------------------

    def step(self, signals: StopSignals) -> tuple[float, float | None, bool]:
        """One iteration: the loss, the gradient norm (None when skipped), stop asked for.

        Raises:
            DamagedError: more wrong steps in a row than may be skipped; none has been applied.
        """
        groups, objective = self.groups, self.objective
        self._at = self.iteration + 1
        self.ddp.train()
        batch = self._batch = self.options.batch_size_after(self.consumed, groups.data_parallel)
        step = step_of(self.options, groups, self._at, batch)
        data = microbatches(self.samples.train, self.consumed, step, groups)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        shares = forward_backward(
            self.ddp,
            objective.beside(data, step),
            step,
            groups,
            objective.loss,
            (LM_LOSS, *objective.names),
            forward_only=False,
        )
        asked, writing = signals.received is not None, self.saver.is_writing
        stops, still_writing, loss, *others = groups.sum_over_ranks(asked, writing, *shares)
        self._all_written = not still_writing
        norm = self._apply(loss, others)
        if norm is not None:
            self.scheduler.step(batch)
        self.iteration += 1
        self.consumed += batch
        return loss, norm, stops > 0

    def _apply(self, loss: float, others: Sequence[float]) -> float | None:
        """Change the weights unless the step is wrong; the gradient norm, None when skipped."""
        wrong, norm = self.guard.wrong_loss(loss, zip(self.objective.names, others)), None
        rate = learning_rate(self.optimizer)
        self.losses.add(loss, None if wrong else others)
        if wrong is None:
            over_ranks = self.groups.sum_over_ranks
            norm = step_optimizer(self.optimizer, lambda norm: over_ranks(norm)[0], self._ready)
            self._count_skipped(norm is not None)
            if norm is not None and not math.isfinite(norm):
                wrong, norm = self._wrong_norm(norm), None
        if norm is not None:
            self.objective.step(rate / self.options.lr if self.options.lr else 1.0, norm)
        if self.guard.count(wrong, loss):
            self._stop_for(f"{wrong}; {self.guard.in_a_row} such steps in a row")
        if wrong is not None:
            self._say(f"iteration {self._at}: {wrong}; skipped")
        return norm

    def _ready(self) -> float:
        """The model's gradients are whole: what is done to them, and those of the objective."""
        if self._hold is not None:
            self._hold()
        self._beside = self.objective.ready(float(self.optimizer.get_loss_scale()))
        return self._beside

    def _wrong_norm(self, norm: float) -> str:
        if math.isfinite(self._beside):
            return f"gradient norm is {norm}"
        return f"gradient norm of the {self.objective.learns} is {self._beside}"

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
        loss = self.samples.validate(self.model, log, self.iteration, self.consumed)
        self.validated_at = self.iteration
        log.validation(self.iteration, self.consumed, loss)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.iteration % interval == 0

    def _must_validate(self) -> bool:
        last = self.iteration == self.options.train_iters
        due = self._is_due(self.options.eval_interval) or self.samples.is_due(self.iteration)
        due = (due or last) and self.iteration > 0
        return bool(self.options.eval_iters) and due and self.validated_at != self.iteration

    def save(self, log: MetricsLog) -> None:
        """Begin to save this iteration, once the save before is done."""
        if self.iteration in (self.saved_at, self.saver.iteration):
            return
        self._finish_save()
        wrong = sum(not bool(p.isfinite().all()) for p in self.model.parameters())
        (wrong_everywhere,) = self.groups.sum_over_ranks(wrong)
        if wrong_everywhere:
            self._stop_for(f"{wrong_everywhere:.0f} parameters hold values that are not finite")
        log.sync()
        self.begin_save()
        if not self.options.async_save:
            self._finish_save()

    def begin_save(self) -> None:
        """The first half of a save, see `Saver.begin`."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        self.saver.begin(self.state(), **parts)

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
            losses=(LM_LOSS, *self.objective.names),
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
            _, norm, stop = self.step(signals)
            log.advance()
            if self._all_written:
                self._finish_save()
            if self._is_due(options.log_interval):
                self._log(log, rate, norm, lapse)
            self.samples.tell(log, self.consumed)
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
        steps = len(self.losses)
        log.training(
            {
                "iteration": self.iteration,
                **self.losses.take_means(),
                **self.objective.told(),
                "learning-rate": rate,
                "grad-norm": norm,
                "loss-scale": float(self.optimizer.get_loss_scale()),
                "skipped-iterations": self.guard.take_skipped(),
                "batch-size": self._batch,
                "consumed-samples": self.consumed,
                "consumed-tokens": self.consumed * self.options.seq_length,
                "seconds": seconds / steps,
                "tokens-per-second": samples * self.options.seq_length / seconds,
            }
        )


def train(
    options: TrainOptions,
    groups: Groups,
    command: Sequence[str] = (),
    wrap: Wrap | None = None,
) -> Training:
    """Check everything, then train; the run as it ended.

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
        training = Training(options, groups, inputs, wrap)
        if groups.ranks.is_first:
            processes = groups.ranks.world_size
            record_command(options.save, command, iteration=training.iteration, processes=processes)
        training.run()
        return training
