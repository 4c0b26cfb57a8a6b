"""`plan --rounds N`: score, prune a part, score what is left, until the target is met.

The model is pruned in sight only (`pruned.PrunedSource`): no weight is written. Each round runs
the model as far as it is pruned, at the layout that the flags name, alone or under torchrun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_prune.criteria import SCORED
from megatron_prune.engine.running import CALIBRATION, PROCESSES
from megatron_prune.errors import ConfigError, ShapeError
from megatron_prune.flags import Group, flag, given_flags
from megatron_prune.model.grid import LAYOUT, ParallelGrid
from megatron_prune.model.lazy import Tensor
from megatron_prune.model.shape import SCORED_AXES, ModelShape
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.margins import decisions, renumbered, rounding_text
from megatron_prune.planning.plan import Kept, PrunePlan, compose
from megatron_prune.planning.rounds import remaining_shape, round_targets, targets_after
from megatron_prune.planning.scores import (
    AXIS_WORDS,
    Scores,
    Terms,
    combined,
    criteria_named,
    narrowed,
)
from megatron_prune.planning.search import shape_words
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import Source
from megatron_prune.stages.common import agree_on_start
from megatron_prune.stages.console import Console
from megatron_prune.stages.deciding import PlanFlags
from megatron_prune.stages.sampling import Scoring

if TYPE_CHECKING:
    from megatron_prune.engine.groups import Groups
    from megatron_prune.engine.observe.score import ScoreOptions


ROUNDS = Group("pruning in rounds (alone, or under torchrun)")


@dataclass(frozen=True, kw_only=True)
class RoundFlags(Scoring, PlanFlags):
    """Of a stage that can prune in rounds."""

    rounds: int | None = flag(
        "score --data, prune a part, score what is left, N times; in place of --scores",
        default=None,
        metavar="N",
        group=ROUNDS,
    )

    def check_rounds(self, *, searches: bool) -> None:
        """Refuse flags that do not go together, before the source is opened.

        Raises:
            ConfigError, PlanError: see the messages.
        """
        if self.rounds is None:
            for name in given_flags(self, ROUNDS, CALIBRATION, LAYOUT, PROCESSES):
                raise ConfigError(f"{name}: belongs to --rounds, which is not given")
            return
        if self.rounds < 1:
            raise ConfigError(f"--rounds {self.rounds}: wanted 1 or more")
        if self.nonuniform:
            raise ConfigError(
                "--nonuniform with --rounds: every round scores equal layers; leave one out"
            )
        if searches:
            raise ConfigError(
                "--rounds with a budget: choose the shape first, and give --rounds its sizes"
            )
        if not self.asks_for_pruning:
            raise ConfigError("--rounds without a target: say what is to remain, see --help")
        if self.scores is not None:
            raise ConfigError(
                f"--rounds with --scores {self.scores}: every round scores for itself; leave one "
                "out"
            )
        if self.decoder_first_pipeline_num_layers or self.decoder_last_pipeline_num_layers:
            raise ConfigError(
                "--rounds with --decoder-first-pipeline-num-layers or --decoder-last-...: the "
                "stages are laid out anew as layers go; leave them out"
            )
        named = criteria_named(self.criterion)
        names = tuple(dict.fromkeys(name for axis in named.values() for name in axis))
        unknown = [name for name in names if name not in SCORED]
        if unknown:
            raise ConfigError(
                f"--rounds with --criterion {self.criterion}: {', '.join(unknown)} is no criterion "
                f"to score again; wanted some of {', '.join(SCORED)}"
            )
        self.check_data(names)


@dataclass(frozen=True, kw_only=True)
class _Round:
    """One round.

    Attributes:
        target: what is to remain of the source; ``shape`` is what that leaves.
        axes: letters of those that scores decide on in this round, by ``criteria``.
    """

    number: int
    target: Targets
    shape: ModelShape
    axes: str
    criteria: tuple[str, ...]


def plan_in_rounds(
    options: RoundFlags, source: Source, targets: Targets, console: Console
) -> PrunePlan:
    """The plan of the last round, in the source's numbers; the same on every rank and layout.

    Costs, for each round, the scoring of the model as far as it is pruned.

    Raises:
        ConfigError, PlanError, ShapeError: what cannot be planned, scored or laid out, before the
            first weight is read.
    """
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.forward.model import check_model
    from megatron_prune.engine.groups import data_parallel_size, model_parallel, world_size

    assert options.rounds is not None
    balance_for, grid = options.balance(source), options.grid
    data_parallel_size(grid, world_size())
    rounds = _rounds(options, options.rounds, source.config.shape, targets, balance_for)
    _check_layouts(grid, source.config.shape, rounds)
    how = options.score_options((), source.config, console)
    check_model(source.config, how.model, grid.tensor_parallel)
    plan = PrunePlan(
        source=source.config.shape,
        kept=Kept(),
        criterion=options.criterion
        if options.rounds == 1
        else f"{options.criterion} ({options.rounds} rounds)",
        seed=options.seed,
        prune_type=options.prune_type,
        balance_for=balance_for if options.prune_type == "balance" else 1,
        source_digest=source.digest,
    )
    timeout = options.distributed_timeout_minutes
    with model_parallel(grid, timeout_minutes=timeout) as groups:
        agree_on_start(groups.ranks, options, source)
        windows = on_first_rank(
            groups.ranks, lambda: options.samples(source, how.model.seq_length, console)
        )
        for one in rounds:
            console.say(f"round {one.number} of {options.rounds}: to {shape_words(one.shape)}")
            plan = _go_on(options, source, plan, one, how, windows, groups, console)
    return plan


def _rounds(
    options: RoundFlags, count: int, shape: ModelShape, targets: Targets, balance_for: int
) -> list[_Round]:
    """Those that change anything: with few layers to drop and many rounds, some do not."""
    named, found, before = criteria_named(options.criterion), [], shape
    all_targets = round_targets(
        shape, targets, count, prune_type=options.prune_type, balance_for=balance_for
    )
    for number, target in enumerate(all_targets, start=1):
        after = remaining_shape(shape, target)
        if after == before:
            continue
        decided = SCORED_AXES.replace("L", "" if target.drop_layers else "L")  # layers may be named
        axes = "".join(axis for axis in decided if after.size(axis) != before.size(axis))
        criteria = dict.fromkeys(name for axis in axes for name in _deciding(options, named, axis))
        found.append(
            _Round(number=number, target=target, shape=after, axes=axes, criteria=tuple(criteria))
        )
        before = after
    if not any(one.axes for one in found):
        raise ConfigError("--rounds: scores have nothing to decide; leave --rounds out")
    return found


def _deciding(options: RoundFlags, named: dict[str, tuple[str, ...]], axis: str) -> tuple[str, ...]:
    """The criteria of an axis, all of which have to score it."""
    word, enough = AXIS_WORDS[axis], {axis, "Q"} if axis == "K" else {axis}
    able = ", ".join(name for name, needs in SCORED.items() if enough & {*needs.axes})
    if axis not in named:
        raise ConfigError(
            f"--criterion {options.criterion}: says nothing of {word}; add {word}=NAME ({able})"
        )
    for name in named[axis]:
        if not enough & {*SCORED[name].axes}:
            raise ConfigError(f"--criterion {name} does not score {word}; those that do: {able}")
    return named[axis]


def _check_layouts(grid: ParallelGrid, shape: ModelShape, rounds: Sequence[_Round]) -> None:
    """Refuse a layout that does not take the source, or what a round leaves for the next."""
    grid.for_layers(shape.num_layers).check(shape)
    for one in rounds[:-1]:
        try:
            grid.for_layers(one.shape.num_layers).check(one.shape)
        except ShapeError as error:
            raise ShapeError(
                f"after round {one.number} of --rounds: {error}; --balance-for a multiple of "
                f"{grid.tensor_parallel} keeps what every round leaves divisible"
            ) from None


def _go_on(
    options: RoundFlags,
    source: Source,
    plan: PrunePlan,
    one: _Round,
    how: ScoreOptions,
    windows: Tensor | None,
    groups: Groups,
    console: Console,
) -> PrunePlan:
    """The plan after one more round."""
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.observe.score import score

    pruned, layers = PrunedSource(source, plan), plan.target.num_layers
    scores = None
    if one.axes:
        greedy = max(layers // 4, layers - one.shape.num_layers, 1)  # as far as the round goes
        scores = score(
            pruned,
            replace(how, criteria=one.criteria, removal_layers=how.removal_layers or greedy),
            replace(groups, grid=groups.grid.for_layers(layers)),
            windows,
            known=None,
            save=lambda found: None,
        )
    return on_first_rank(groups.ranks, lambda: _decide(options, plan, one, pruned, scores, console))


def _decide(
    options: RoundFlags,
    plan: PrunePlan,
    one: _Round,
    pruned: Source,
    scores: Scores | None,
    console: Console,
) -> PrunePlan:
    """The plan with what this round drops; says which of its decisions are within rounding."""
    terms: Terms = _undecided
    if scores is not None:
        terms = scores.terms(narrowed(options.criterion, one.axes))
    step = make_plan(
        pruned.config.shape,
        targets_after(plan, one.target),
        lambda axis, size, layer, seed: combined(terms(axis, size, layer)),
        criterion_name=plan.criterion,
        seed=plan.seed,
        prune_type=plan.prune_type,
        balance_for=plan.balance_for,
        source_digest=pruned.digest,
    )
    found = [renumbered(decision, plan) for decision in decisions(step, terms, one.axes)]
    if text := rounding_text(found):
        console.say(f"warning: round {one.number}: {text}")
    return compose(plan, step)


def _undecided(axis: str, size: int, layer: int | None) -> list[tuple[float, Tensor]]:
    raise AssertionError(f"scores of axis {axis} asked for in a round that drops named layers only")
