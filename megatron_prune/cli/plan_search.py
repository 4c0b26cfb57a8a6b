"""`plan --target-params | --target-memory | --target-latency`: a shape from a budget.

Searches the legal shapes, ranks them by the scores (`search`, `score_mass`), tries the best ones on
a text when there is one, and gives the plan its targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_prune.cli import options
from megatron_prune.cli.candidates import candidates_json, show_candidates
from megatron_prune.cli.judging import Losses, judging
from megatron_prune.cli.quantities import (
    parse_latency,
    parse_memory,
    parse_parameters,
    parse_weights,
)
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.files import replace_file
from megatron_prune.model.costs import (
    DTYPE_BYTES,
    flops_at,
    parameters_at,
    serving_bytes,
    sizes_of,
)
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.planning.choose import Targets
from megatron_prune.planning.latency import LatencyModel, fit_latency, load_latency_table
from megatron_prune.planning.plan import PrunePlan
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

_TARGETS = ("target_params", "target_memory", "target_latency")
_FRONT_LIMITS = 24  # points of the picture: from the smallest legal shape to the source
_FRONT_COUNT = 4  # shapes at each of them
_FLAGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("target-params", {"metavar": "N", "help": "parameters at most: 3.4e9, 3.4B, 500M"}),
    (
        "target-memory",
        {"metavar": "SIZE", "help": "8GiB at most: weights, KV cache and activations, all ranks"},
    ),
    (
        "target-latency",
        {"metavar": "T", "help": "a forward in 20ms by --latency-table, or in 60%% of the source's "
         "(by its FLOPs without a table)"},
    ),
    ("latency-table", {"type": Path, "metavar": "JSON", "help": "of `megatron-prune profile`"}),
    (
        "at-seq",
        {"type": options.positive, "metavar": "N", "help": "tokens a sequence (default: 4096)"},
    ),
    (
        "at-batch",
        {"type": options.positive, "metavar": "N", "help": "sequences at once (default: 1)"},
    ),
    ("at-dtype", {"choices": DTYPE_BYTES, "help": "of weights and cache (default: the model's)"}),
    (
        "candidates",
        {"type": options.positive, "metavar": "K", "help": "shapes to list and try (default: 5)"},
    ),
    (
        "candidates-json",
        {"type": Path, "metavar": "FILE", "help": "they, and the front of cost against proxy"},
    ),
    (
        "min-layers",
        {"type": options.positive, "metavar": "N", "help": "default: half of the source's"},
    ),
    (
        "multiple-of",
        {"type": options.positive, "metavar": "N",
         "help": "of hidden and FFN (default: 64, less where an axis is shorter than 1024)"},
    ),
    (
        "proportions",
        {"type": float, "metavar": "X", "help": "FFN and attention against hidden at most this "
         "factor from the source's (default: 2)"},
    ),
    (
        "proxy-weights",
        {"metavar": "W", "help": "nats lost when an axis is halved, for the ranking, such as "
         "hidden=7,layers=3 (default: measured on --evaluate-data, else SmolLM2's)"},
    ),
    (
        "evaluate-data",
        {"type": Path, "metavar": "TEXT", "help": "take the candidate with the least loss on it"},
    ),
    (
        "evaluate-seq-length",
        {"type": options.positive, "metavar": "N", "help": "tokens a window (default: 1024)"},
    ),
    (
        "max-windows",
        {"type": options.positive, "metavar": "N", "help": "of the text (default: 16)"},
    ),
    (
        "repair-data",
        {"type": Path, "metavar": "CALIB", "help": "repair each candidate on it before its loss "
         "is taken, as prune --repair --norm-rescale does"},
    ),
    (
        "repair-samples",
        {"type": options.positive, "metavar": "N", "help": "windows of CALIB (default: 16)"},
    ),
    ("cache", {"type": Path, "metavar": "DIR", "help": "of losses: the same command goes on"}),
)  # fmt: skip


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a shape from a budget."""
    group = parser.add_argument_group("a shape from a budget")
    for flag, how in _FLAGS:
        group.add_argument(f"--{flag}", **how)
    group.add_argument("--drop-query-groups", action="store_true", help="let whole query groups go")


def asks_for_search(args: argparse.Namespace) -> bool:
    """Whether a budget is given. Commands without these flags ask for none.

    Raises:
        ConfigError: flags of the search, and no budget.
    """
    if any(getattr(args, name, None) is not None for name in _TARGETS):
        return True
    names = [flag.replace("-", "_") for flag, _ in _FLAGS]
    given = [name for name in names if getattr(args, name, None) is not None]
    if getattr(args, "drop_query_groups", False):
        given.append("drop_query_groups")
    if given:
        raise ConfigError(
            f"--{given[0].replace('_', '-')}: belongs to a search; say for what budget, with "
            "--target-params, --target-memory or --target-latency"
        )
    return False


def check_search(args: argparse.Namespace) -> None:
    """Refuse what is malformed or missing, before the source is opened.

    Raises:
        ConfigError, PlanError: a flag that cannot be used.
    """
    if not asks_for_search(args):
        return
    for flag, parse in (
        ("target_params", parse_parameters),
        ("target_memory", parse_memory),
        ("target_latency", parse_latency),
        ("proxy_weights", parse_weights),
    ):
        if getattr(args, flag) is not None:
            parse(getattr(args, flag))
    if args.latency_table is not None:
        load_latency_table(args.latency_table)
    elif args.target_latency is not None and not parse_latency(args.target_latency)[1]:
        raise ConfigError(
            f"--target-latency {args.target_latency}: a time needs --latency-table, measured on "
            "this machine by `megatron-prune profile`; without one give a share of the source's "
            "forward, such as 60%, which is counted in FLOPs"
        )
    _check_outputs(args)
    if args.at_seq is not None and args.target_memory is None and args.target_latency is None:
        raise ConfigError("--at-seq: needs --target-memory or --target-latency")
    if args.at_batch is not None and args.target_memory is None and args.latency_table is None:
        raise ConfigError("--at-batch: needs --target-memory or --latency-table")
    for flag in ("max_windows", "evaluate_seq_length", "repair_data", "cache"):
        if getattr(args, flag) is not None and args.evaluate_data is None:
            raise ConfigError(f"--{flag.replace('_', '-')}: needs --evaluate-data TEXT")
    if args.repair_samples is not None and args.repair_data is None:
        raise ConfigError("--repair-samples: needs --repair-data CALIB")
    for flag in ("evaluate_data", "repair_data"):
        path = getattr(args, flag)
        if path is not None and not path.is_file():
            raise ConfigError(f"--{flag.replace('_', '-')} {path}: is not a file; wanted a text")
    if args.evaluate_data is not None:
        from megatron_prune.engine.groups import world_size

        if world_size() > 1:
            raise ConfigError(
                f"--evaluate-data under torchrun with {world_size()} processes: candidates are "
                "tried one after the other in one process; start plan without torchrun"
            )


def _check_outputs(args: argparse.Namespace) -> None:
    inputs = search_inputs(args)
    if (path := args.candidates_json) is not None:
        flag = "--candidates-json"
        options.check_output_file(path, overwrite=args.overwrite, inputs=inputs, flag=flag)
        if path.resolve() == args.save.resolve():
            raise ConfigError(f"{flag} {path}: is --save, the plan's own file; choose another")
    if args.cache is not None:
        options.check_not_input("--cache", args.cache, inputs)


def search_inputs(args: argparse.Namespace) -> tuple[Path | None, ...]:
    """Everything that ``plan`` reads."""
    read = (args.load, args.scores, args.prune_config_path, args.latency_table)
    return (*read, args.evaluate_data, args.repair_data)


def search_targets(
    args: argparse.Namespace,
    source: Source,
    criterion: Criterion,
    planner: Callable[[Targets], PrunePlan],
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
    config, balance_for = source.config, options.balance_for(args, source)
    latency = _latency_model(args, config, balance_for)
    budgets = _budgets(args, config, latency)
    scored = scored_axes(config.shape, criterion, seed=args.seed)
    fixed = _fixed(config.shape, pinned, scored, args)
    space = search_space(
        config.shape,
        balance_for=balance_for,
        multiple_of=args.multiple_of,
        min_layers=args.min_layers,
        proportions=2.0 if args.proportions is None else args.proportions,
        hidden_multiple_of_heads=config.family.hidden_multiple_of_heads,
        drop_query_groups=args.drop_query_groups,
        fixed=fixed,
    )
    weights = parse_weights(args.proxy_weights) if args.proxy_weights else {}
    whole = {axis for axis in "LDQKF" if fixed.get(axis) == config.shape.size(axis)}
    mass = measure_scores(
        config.shape,
        criterion,
        seed=args.seed,
        blocks=balance_for if args.prune_type == "balance" else 1,
        weights=weights,
        whole=frozenset(whole | ({*"LDQKF"} - scored)),
    )
    losses: list[float] = []  # of the source, then of the candidates
    with judging(args, source) as judge:
        if judge is not None and not args.proxy_weights:
            mass = _calibrated(judge, planner, space, mass)
        found = search(space, budgets, mass, args.candidates or 5)
        if judge is not None:
            targets = [_targets(candidate.shape, pinned) for candidate in found]
            losses = judge([planner(x) for x in (Targets(), *targets)], "candidate")
            found = [found[n] for n in sorted(range(len(found)), key=lambda n: losses[n + 1])]
            losses[1:] = sorted(losses[1:])
    served = replace(config, dtype=args.at_dtype or config.dtype)
    show_candidates(served, found, losses, latency)
    if found[0].shape == config.shape:
        options.say("the source meets the budget as it is: nothing has to be pruned")
    if args.candidates_json is not None and not args.dry_run:
        facts = {"criterion": args.criterion, "seed": args.seed, "weights": dict(mass.weights)}
        front = _front(space, budgets[0], mass)
        text = candidates_json(served, facts, budgets, found, losses[1:], front)
        replace_file(args.candidates_json, text.encode())
    return _targets(found[0].shape, pinned)


def _latency_model(
    args: argparse.Namespace, config: ModelConfig, balance_for: int
) -> LatencyModel | None:
    if args.latency_table is None:
        return None
    table = load_latency_table(args.latency_table)
    if table.kv_channels != config.shape.kv_channels:
        raise PlanError(
            f"--latency-table {args.latency_table}: measured with kv_channels {table.kv_channels}, "
            f"the model has {config.shape.kv_channels}; measure this model"
        )
    conditions = (
        ("--at-seq", args.at_seq, table.seq_length),
        ("--at-batch", args.at_batch, table.batch_size),
        ("--at-dtype", args.at_dtype, table.dtype),
        ("--balance-for", balance_for, table.tensor_parallel),
    )
    measured = (
        f"measured on {table.device} with {table.batch_size} x {table.seq_length} tokens in "
        f"{table.dtype} at TP {table.tensor_parallel}"
    )
    for flag, wanted, found in conditions:
        if wanted is not None and wanted != found:
            raise PlanError(
                f"--latency-table {args.latency_table}: {measured}, asked for is {flag} {wanted}; "
                f"measure again so, or give {flag} {found}"
            )
    options.say(f"--latency-table {args.latency_table}: {measured}")
    return fit_latency(table)


def _budgets(
    args: argparse.Namespace, config: ModelConfig, latency: LatencyModel | None
) -> list[Budget]:
    """One for each ``--target-...``, in that order."""
    found = []
    dtype, seq_length = args.at_dtype or config.dtype, args.at_seq or 4096
    if args.target_params is not None:
        found.append(
            Budget(
                name="parameters",
                flag="--target-params",
                limit=parse_parameters(args.target_params),
                cost=lambda sizes: parameters_at(config, sizes),
                unit="M parameters",
                scale=1e6,
            )
        )
    if args.target_memory is not None:
        found.append(
            Budget(
                name="bytes",
                flag="--target-memory",
                limit=parse_memory(args.target_memory),
                cost=lambda sizes: serving_bytes(
                    config,
                    sizes,
                    seq_length=seq_length,
                    batch_size=args.at_batch or 1,
                    dtype=dtype,
                ),
                unit="MiB",
                scale=2**20,
            )
        )
    if args.target_latency is not None:
        found.append(_latency_budget(args, config, latency, seq_length))
    return found


def _latency_budget(
    args: argparse.Namespace, config: ModelConfig, latency: LatencyModel | None, seq_length: int
) -> Budget:
    value, is_share = parse_latency(args.target_latency)
    whole = sizes_of(config.shape)
    flag = "--target-latency"
    if latency is not None:
        limit = value * float(latency.seconds_at(whole)) if is_share else value
        return Budget(
            name="seconds", flag=flag, limit=limit, cost=latency.seconds_at, unit="ms", scale=1e-3
        )
    options.say(
        f"--target-latency {args.target_latency} without --latency-table: counted in FLOPs a token "
        f"at {seq_length} tokens of context; a smaller shape rarely gains as much time"
    )
    return Budget(
        name="flops_per_token",
        flag=flag,
        limit=value * float(flops_at(config, whole, seq_length)),
        cost=lambda sizes: flops_at(config, sizes, seq_length),
        unit="MFLOP/token",
        scale=1e6,
    )


def _fixed(
    shape: ModelShape, pinned: Targets, scored: frozenset[str], args: argparse.Namespace
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
                f"{args.criterion} does not score it; name one that does as AXIS=NAME, or leave "
                "the axis whole"
            )
    if pinned.drop_layers:
        found["L"] = shape.num_layers - len(pinned.drop_layers)
    unscored = [axis for axis in AXES if axis not in scored and axis not in found]
    groups_may_go = args.drop_query_groups or shape.heads_per_group == 1
    if "K" not in found and groups_may_go and not scored >= {"Q", "K"}:
        unscored.append("K")
    if unscored:
        words = ", ".join(AXES.get(axis, "query groups") for axis in unscored)
        options.say(f"--criterion {args.criterion} does not score {words}: kept whole")
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
    judge: Losses,
    planner: Callable[[Targets], PrunePlan],
    space: SearchSpace,
    mass: ScoreMass,
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
    options.say(f"nats when an axis is halved, by these: {words}")
    return mass


def _front(space: SearchSpace, budget: Budget, mass: ScoreMass) -> list[Candidate]:
    """Cost against proxy, from small to the source: the points of a picture."""
    whole = float(budget.cost(sizes_of(space.source)))
    limits = [whole * n / _FRONT_LIMITS for n in range(1, _FRONT_LIMITS + 1)]
    return search_front(space, budget, mass, [*limits, budget.limit], _FRONT_COUNT)
