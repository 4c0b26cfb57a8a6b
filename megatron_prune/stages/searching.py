"""`plan --target-params | --target-memory | --target-latency`: a shape from a budget.

Searches the legal shapes, ranks them by the scores (`search`, `score_mass`), tries the best ones on
a text when there is one, and gives the plan its targets.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_prune.errors import PlanError
from megatron_prune.files import replace_file
from megatron_prune.model.costs import sizes_of
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.choose import Targets
from megatron_prune.planning.score_mass import AXES, ScoreMass, measure_scores, scored_axes
from megatron_prune.planning.scores import Criterion
from megatron_prune.planning.search import (
    Budget,
    Candidate,
    SearchSpace,
    axis_probes,
    search,
    search_front,
    search_space,
)
from megatron_prune.sources.source import Source
from megatron_prune.stages.budgets import SearchFlags, budgets, latency_model
from megatron_prune.stages.candidates import candidates_json, candidates_table
from megatron_prune.stages.console import Console
from megatron_prune.stages.deciding import Planner
from megatron_prune.stages.judging import Losses, judging
from megatron_prune.stages.quantities import parse_weights

_FRONT_LIMITS = 24  # points of the picture: from the smallest legal shape to the source
_FRONT_COUNT = 4  # shapes at each of them


def search_targets(
    options: SearchFlags,
    console: Console,
    source: Source,
    criterion: Criterion,
    planner: Planner,
    pinned: Targets,
) -> Targets:
    """What is to remain so that the budget is met with the least loss; prints the best shapes.

    Args:
        planner: makes the plan of targets, with the criterion and all else the flags say.
        pinned: what other flags name; the search leaves it as it is.

    Raises:
        PlanError: no legal shape meets the budget; names the nearest.
        ConfigError: a latency table of another model, a text that does not fit.
    """
    config, balance_for = source.config, options.balance(source)
    latency = latency_model(options, config, balance_for, console)
    limits = budgets(options, config, latency, console)
    scored = scored_axes(config.shape, criterion, seed=options.seed)
    fixed = _fixed(config.shape, pinned, scored, options, console)
    space = search_space(
        config.shape,
        balance_for=balance_for,
        multiple_of=options.multiple_of,
        min_layers=options.min_layers,
        proportions=options.proportions,
        hidden_multiple_of_heads=config.family.hidden_multiple_of_heads,
        drop_query_groups=options.drop_query_groups,
        fixed=fixed,
    )
    weights = parse_weights(options.proxy_weights) if options.proxy_weights else {}
    whole = {axis for axis in "LDQKF" if fixed.get(axis) == config.shape.size(axis)}
    mass = measure_scores(
        config.shape,
        criterion,
        seed=options.seed,
        blocks=balance_for if options.prune_type == "balance" else 1,
        weights=weights,
        whole=frozenset(whole | ({*"LDQKF"} - scored)),
    )
    losses: list[float] = []  # of the source, then of the candidates
    with judging(options, source, console) as judge:
        if judge is not None and not options.proxy_weights:
            mass = _calibrated(judge, planner, space, mass, console)
        found = search(space, limits, mass, options.candidates)
        if judge is not None:
            targets = [_targets(candidate.shape, pinned) for candidate in found]
            losses = judge([planner(x) for x in (Targets(), *targets)], "candidate")
            found = [found[n] for n in sorted(range(len(found)), key=lambda n: losses[n + 1])]
            losses[1:] = sorted(losses[1:])
    served = replace(config, dtype=options.at_dtype or config.dtype)
    console.show(candidates_table(served, found, losses, latency))
    if found[0].shape == config.shape:
        console.say("the source meets the budget as it is: nothing has to be pruned")
    if options.candidates_json is not None and not options.dry_run:
        facts = {
            "criterion": options.criterion,
            "seed": options.seed,
            "weights": dict(mass.weights),
        }
        front = _front(space, limits[0], mass)
        text = candidates_json(served, facts, limits, found, losses[1:], front)
        replace_file(options.candidates_json, text.encode())
    return _targets(found[0].shape, pinned)


def _fixed(
    shape: ModelShape,
    pinned: Targets,
    scored: frozenset[str],
    options: SearchFlags,
    console: Console,
) -> dict[str, int]:
    """Sizes that are not searched: named by other flags, or of axes the criterion cannot judge."""
    named = {
        "D": pinned.hidden_size,
        "F": pinned.ffn_hidden_size,
        "Q": pinned.num_attention_heads,
        "K": pinned.num_query_groups,
        "L": pinned.num_layers,
    }
    found = {axis: size for axis, size in named.items() if size is not None}
    for axis, size in found.items():
        if size < shape.size(axis) and axis not in scored:
            raise PlanError(
                f"axis {axis}: {size} of {shape.size(axis)} are asked for, and --criterion "
                f"{options.criterion} does not score it; name one that does as AXIS=NAME, or leave "
                "the axis whole"
            )
    if pinned.drop_layers:
        found["L"] = shape.num_layers - len(pinned.drop_layers)
    unscored = [axis for axis in AXES if axis not in scored and axis not in found]
    groups_may_go = options.drop_query_groups or shape.heads_per_group == 1
    if "K" not in found and groups_may_go and not scored >= {"Q", "K"}:
        unscored.append("K")
    if unscored:
        words = ", ".join(AXES.get(axis, "query groups") for axis in unscored)
        console.say(f"--criterion {options.criterion} does not score {words}: kept whole")
    return {**{axis: shape.size(axis) for axis in unscored}, **found}


def _targets(target: ModelShape, pinned: Targets) -> Targets:
    """The targets of a shape; layers that were named go, else the lowest-scored ones."""
    return Targets(
        hidden_size=target.hidden_size,
        ffn_hidden_size=target.ffn_hidden_size,
        num_attention_heads=target.num_attention_heads,
        num_query_groups=target.num_query_groups,
        num_layers=None if pinned.drop_layers else target.num_layers,
        drop_layers=pinned.drop_layers,
    )


def _calibrated(
    judge: Losses, planner: Planner, space: SearchSpace, mass: ScoreMass, console: Console
) -> ScoreMass:
    """The proxy with weights from one real loss an axis."""
    probes = axis_probes(space)
    plans = [planner(Targets()), *(planner(_targets(s, Targets())) for s in probes.values())]
    dense, *losses = judge(plans, "probe")
    found = {
        name: (sizes_of(shape), loss - dense) for (name, shape), loss in zip(probes.items(), losses)
    }
    mass = mass.calibrated(found)
    words = ", ".join(f"{name} {mass.weights[name]:.3g}" for name in found)
    console.say(f"nats when an axis is halved, by these: {words}")
    return mass


def _front(space: SearchSpace, budget: Budget, mass: ScoreMass) -> list[Candidate]:
    """Cost against proxy, from small to the source: the points of a picture."""
    whole = float(budget.cost(sizes_of(space.source)))
    limits = [whole * n / _FRONT_LIMITS for n in range(1, _FRONT_LIMITS + 1)]
    return search_front(space, budget, mass, [*limits, budget.limit], _FRONT_COUNT)
