"""`plan --rounds N`: score, prune a part, score what is left, until the target is met.

The model is pruned in sight only (`pruned.PrunedSource`): no weight is written. Each round runs
the model as far as it is pruned, at the layout that the flags name, alone or under torchrun.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_prune.cli import options
from megatron_prune.cli.engine_flags import add_engine, process_groups
from megatron_prune.cli.plan_search import asks_for_search
from megatron_prune.cli.score_flags import (
    add_score_arguments,
    check_data,
    score_options,
    score_windows,
)
from megatron_prune.criteria import SCORED
from megatron_prune.errors import ConfigError, ShapeError
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.margins import decisions, renumbered, rounding_text
from megatron_prune.planning.plan import Kept, PrunePlan, compose
from megatron_prune.planning.rounds import remaining_shape, round_targets, targets_after
from megatron_prune.planning.scores import (
    AXES,
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

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.engine.groups import Groups
    from megatron_prune.engine.observe.score import ScoreOptions


def add_round_arguments(parser: argparse.ArgumentParser) -> None:
    """``--rounds`` and all that scoring takes."""
    group = parser.add_argument_group("pruning in rounds (alone, or under torchrun)")
    group.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help="score --data, prune a part, score what is left, N times; in place of --scores",
    )
    add_score_arguments(parser)
    add_engine(parser, family=False)


def check_rounds(args: argparse.Namespace, *, has_target: bool) -> None:
    """Refuse flags that do not go together, before the source is opened.

    Raises:
        ConfigError, PlanError: see the messages.
    """
    if args.rounds is None:
        _check_unused(args)
        return
    if args.rounds < 1:
        raise ConfigError(f"--rounds {args.rounds}: wanted 1 or more")
    if asks_for_search(args):
        raise ConfigError(
            "--rounds with a budget: choose the shape first, and give --rounds its sizes"
        )
    if not has_target:
        raise ConfigError("--rounds without a target: say what is to remain, see --help")
    if args.scores is not None:
        raise ConfigError(
            f"--rounds with --scores {args.scores}: every round scores for itself; leave one out"
        )
    if (args.decoder_first_pipeline_num_layers, args.decoder_last_pipeline_num_layers) != (
        None,
        None,
    ):
        raise ConfigError(
            "--rounds with --decoder-first-pipeline-num-layers or --decoder-last-...: the stages "
            "are laid out anew as layers go; leave them out"
        )
    named = criteria_named(args.criterion)
    names = tuple(dict.fromkeys(name for axis in named.values() for name in axis))
    unknown = [name for name in names if name not in SCORED]
    if unknown:
        raise ConfigError(
            f"--rounds with --criterion {args.criterion}: {', '.join(unknown)} is no criterion to "
            f"score again; wanted some of {', '.join(SCORED)}"
        )
    check_data(args, names)


def _check_unused(args: argparse.Namespace) -> None:
    parser = argparse.ArgumentParser()
    add_round_arguments(parser)
    for name, default in vars(parser.parse_args([])).items():
        if getattr(args, name) != default:
            raise ConfigError(
                f"--{name.replace('_', '-')}: belongs to --rounds, which is not given"
            )


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


def plan_in_rounds(args: argparse.Namespace, source: Source, targets: Targets) -> PrunePlan:
    """The plan of the last round, in the source's numbers; the same on every rank and layout.

    Costs, for each round, the scoring of the model as far as it is pruned.

    Raises:
        ConfigError, PlanError, ShapeError: what cannot be planned, scored or laid out, before the
            first weight is read.
    """
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.forward.model import check_model
    from megatron_prune.engine.groups import data_parallel_size, world_size

    balance_for = source.grid.tensor_parallel if args.balance_for is None else args.balance_for
    grid = ParallelGrid(
        tensor_parallel=args.tensor_model_parallel_size,
        pipeline_parallel=args.pipeline_model_parallel_size,
    )
    data_parallel_size(grid, world_size())
    rounds = _rounds(args, source.config.shape, targets, balance_for)
    _check_layouts(grid, source.config.shape, rounds)
    how = score_options(args, (), source.config)
    check_model(source.config, how.model, grid.tensor_parallel)
    plan = PrunePlan(
        source=source.config.shape,
        kept=Kept(),
        criterion=args.criterion
        if args.rounds == 1
        else f"{args.criterion} ({args.rounds} rounds)",
        seed=args.seed,
        prune_type=args.prune_type,
        balance_for=balance_for if args.prune_type == "balance" else 1,
        source_digest=source.digest,
    )
    with process_groups(args, grid) as groups:
        options.agree_on_arguments(groups.ranks, args)
        windows = on_first_rank(
            groups.ranks, lambda: score_windows(args, source, how.model.seq_length)
        )
        for one in rounds:
            options.say(f"round {one.number} of {args.rounds}: to {shape_words(one.shape)}")
            plan = _go_on(args, source, plan, one, how, windows, groups)
    return plan


def _rounds(
    args: argparse.Namespace, shape: ModelShape, targets: Targets, balance_for: int
) -> list[_Round]:
    """Those that change anything: with few layers to drop and many rounds, some do not."""
    named, found, before = criteria_named(args.criterion), [], shape
    all_targets = round_targets(
        shape, targets, args.rounds, prune_type=args.prune_type, balance_for=balance_for
    )
    for number, target in enumerate(all_targets, start=1):
        after = remaining_shape(shape, target)
        if after == before:
            continue
        decided = "DQKF" if target.drop_layers else AXES  # layers may be named
        axes = "".join(axis for axis in decided if after.size(axis) != before.size(axis))
        criteria = dict.fromkeys(name for axis in axes for name in _deciding(args, named, axis))
        found.append(
            _Round(number=number, target=target, shape=after, axes=axes, criteria=tuple(criteria))
        )
        before = after
    if not any(one.axes for one in found):
        raise ConfigError("--rounds: scores have nothing to decide; leave --rounds out")
    return found


def _deciding(
    args: argparse.Namespace, named: dict[str, tuple[str, ...]], axis: str
) -> tuple[str, ...]:
    """The criteria of an axis, all of which have to score it."""
    word, enough = AXIS_WORDS[axis], {axis, "Q"} if axis == "K" else {axis}
    able = ", ".join(name for name, needs in SCORED.items() if enough & {*needs.axes})
    if axis not in named:
        raise ConfigError(
            f"--criterion {args.criterion}: says nothing of {word}; add {word}=NAME ({able})"
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
    args: argparse.Namespace,
    source: Source,
    plan: PrunePlan,
    one: _Round,
    how: ScoreOptions,
    windows: Tensor | None,
    groups: Groups,
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
    return on_first_rank(groups.ranks, lambda: _decide(args, plan, one, pruned, scores))


def _decide(
    args: argparse.Namespace, plan: PrunePlan, one: _Round, pruned: Source, scores: Scores | None
) -> PrunePlan:
    """The plan with what this round drops; says which of its decisions are within rounding."""
    terms: Terms = _undecided
    if scores is not None:
        terms = scores.terms(narrowed(args.criterion, one.axes))
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
        options.say(f"warning: round {one.number}: {text}")
    return compose(plan, step)


def _undecided(axis: str, size: int, layer: int | None) -> list[tuple[float, Tensor]]:
    raise AssertionError(f"scores of axis {axis} asked for in a round that drops named layers only")
