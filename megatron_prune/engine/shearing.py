"""A run of `shear`: masks and weights trained together, and what is measured at its end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.objective import Objective
from megatron_prune.engine.objectives.self_distillation import SelfDistillation
from megatron_prune.engine.objectives.shear_decision import Decision
from megatron_prune.engine.objectives.shearing import FREEZES, Shearing
from megatron_prune.engine.objectives.teachers import load_teacher
from megatron_prune.engine.train.checkpoint import Start, find_start
from megatron_prune.engine.train.inputs import RunInputs, model_options, open_model
from megatron_prune.engine.train.loop import train
from megatron_prune.engine.train.shear_options import ShearOptions
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES
from megatron_prune.planning.scores import load_scores
from megatron_prune.shearing.masks import Masks
from megatron_prune.shearing.words import MASKS
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Validation losses at the end of a run, in nats; None where there is no validation.

    Attributes:
        soft: with all gates as they are; final: with those of the final shape.
    """

    soft: float | None = None
    final: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A run that has ended.

    Attributes:
        distances: what is held to a target -> expected sparsity, target.
        measure: loss of a model in a directory on the run's validation samples; None without any.
    """

    is_done: bool
    losses: Losses
    distances: Mapping[str, tuple[float, float]]
    measure: Callable[[Path], float] | None


def decision_of(options: ShearOptions, source: Source, digest: str) -> Decision:
    """What the flags ask for, of a model.

    Raises:
        PlanError, ShapeError, ConfigError: the model does not allow it.
    """
    ranks = source.grid.tensor_parallel
    target, balance = options.target_shape(source.config.shape, ranks), options.ranks(ranks)
    options.constraint(source.config, target, balance)
    decision = Decision(
        config=source.config,
        target=target,
        target_params=options.target_params,
        prune_type=options.prune_type,
        ranks=balance,
        mask_units=options.mask_units,
        seed=options.seed,
        source_digest=digest,
        method=options.mask_method,
        steps=options.train_iters,
    )
    decision.check_size()
    return decision


def check_run(options: ShearOptions) -> str:
    """Open the model and hold the target against it, before any process group is made.

    Returns:
        What the masks are and where they are to lead.

    Raises:
        PruneError: see `open_model` and `decision_of`.
    """
    start = find_start(options, mend=False)
    source = open_model(options, start, options.grid)
    try:
        state = _masks_in(start)
        if state is None:
            decision = decision_of(options, source, source.digest)
            if options.mask_init is not None:
                _ranks_of(options, decision)
        else:
            decision = _continued(options, state, source)
    finally:
        source.close()
    axes = ", ".join(
        f"{axis.rows} x {axis.size} {axis.word}" + f" to {axis.keep}" * (axis.keep is not None)
        for axis in decision.axes
    )
    return f"{'masks':<11} {options.mask_method}: {axes}"


def _masks_in(start: Start) -> Mapping[str, Any] | None:
    """The training state that a run begins with, where it has masks."""
    return start.state if start.state is not None and MASKS in start.state else None


def _continued(options: ShearOptions, state: Mapping[str, Any], source: Source) -> Decision:
    """The decision of a run that goes on.

    Raises:
        ConfigError: the flags ask for another one.
    """
    saved = Decision.of_facts(state[MASKS], source.config)
    if state[MASKS].get(FREEZES, False) != options.freeze_weights:
        word = "without" if options.freeze_weights else "with"
        raise ConfigError(
            f"--save {options.save}: was trained {word} --freeze-weights; give the same flags, or "
            "another --save"
        )
    balance = options.balance_for or saved.ranks
    asked = decision_of(replace(options, balance_for=balance), source, saved.source_digest)
    now, then = asked.facts(), saved.facts()
    for name in then.keys() - {"steps"}:  # a run may be made longer
        if now[name] != then[name]:
            raise ConfigError(
                f"--save {options.save}: its masks are learned with {name} {then[name]}, the flags "
                f"say {now[name]}; give the same flags, or another --save"
            )
    return asked


def _ranks_of(options: ShearOptions, decision: Decision) -> dict[str, Tensor]:
    """Of each gate its place in its row by the scores to begin with: 0 first to go, 1 last.

    Raises:
        PlanError: no scores, none of this model, or none of an axis with gates.
    """
    assert options.mask_init is not None and options.mask_init_criterion is not None
    scores = load_scores(options.mask_init)
    if scores.source_digest != decision.source_digest:
        raise PlanError(
            f"--mask-init {options.mask_init}: of another model ({scores.source_digest[:12]}..., "
            f"this one is {decision.source_digest[:12]}...); score the model of --load"
        )
    criterion = scores.criterion(options.mask_init_criterion)
    found = {}
    for axis in decision.axes:
        layers = range(axis.rows) if AXES[axis.letter].is_per_layer else (None,)
        rows = [criterion(axis.letter, axis.size, n, options.seed) for n in layers]
        places = torch.stack(rows).argsort(dim=1, stable=True).argsort(dim=1)
        found[axis.letter] = places / max(axis.size - 1, 1)
    return found


def masks_of(options: ShearOptions, decision: Decision, *, begins: bool) -> Masks:
    """The masks of a run; ordered by scores where it ``begins``, else its state is loaded later."""
    constraint = options.constraint(decision.config, decision.target, decision.ranks)
    rates, steps = options.rates, options.train_iters
    masks = Masks(options.mask_method, constraint, rates, options.seed, steps)
    if begins and options.mask_init is not None:
        masks.order_by(_ranks_of(options, decision))
    return masks


def _wrapped(
    options: ShearOptions, inner: Objective, inputs: RunInputs, groups: Groups
) -> Shearing:
    """Gates around what is minimised."""
    source, state = inputs.source, _masks_in(inputs.start)
    if state is None:
        decision = decision_of(options, source, source.digest)
    else:
        decision = _continued(options, state, source)
    if options.distill_self is not None:
        inner = SelfDistillation(options.distill_self, model_options(options), groups)
    gated = Shearing(
        inner,
        masks_of(options, decision, begins=state is None),
        decision,
        groups,
        clip=options.clip_grad,
        is_joint=options.clip_masks == "joint",
        freezes=options.freeze_weights,
        state=state,
    )
    if isinstance(inner, SelfDistillation):
        inner.without_gates = gated.without_gates
    return gated


def learn(options: ShearOptions, groups: Groups, command: Sequence[str]) -> Ended:
    """Train to the end, and measure there.

    Raises:
        PruneError, Interrupted: see `train`.
    """
    run = train(options, groups, command, lambda *parts: _wrapped(options, *parts))
    gated, samples, model = run.objective, run.samples, run.model
    assert isinstance(gated, Shearing)
    is_done, losses = run.iteration == options.train_iters, Losses()
    if is_done and options.eval_iters:
        found = {}
        for kind in ("soft", "final"):
            gated.judge(kind)
            found[kind] = samples.loss(model)
        losses = Losses(**found)

    def measure(directory: Path) -> float:
        gc.collect()  # the model of the run, which its hooks hold
        source = open_source(directory)
        return samples.loss(load_teacher(source, groups, model_options(options)))

    return Ended(
        is_done=is_done,
        losses=losses,
        distances=gated.distances(),
        measure=measure if losses.final is not None else None,
    )
