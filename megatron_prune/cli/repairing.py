"""The flags of ``prune`` that repair what was cut, and the run behind them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from megatron_prune.cli import options
from megatron_prune.cli.calibration import (
    add_calibration_arguments,
    calibration_grid,
    calibration_windows,
    longest_window,
)
from megatron_prune.cli.engine_flags import process_groups
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.planning.fit import DAMPING, FIT_TARGETS, READERS_DAMPING, STATISTICS, Fit
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Scores, load_scores
from megatron_prune.ranks import Ranks
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.repair_record import Repair, Replaced
from megatron_prune.sources.replaced import RepairedSource, Tensors
from megatron_prune.sources.source import Source
from megatron_prune.store.commit import scratch_directory

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_prune.engine.forward.model import ModelOptions
    from megatron_prune.engine.groups import Groups

_FITTED = {
    "least-squares": "projections: relative error of their outputs",
    "readers": "weights that read a norm: relative error of the state they read",
}


def add_repair_arguments(parser: argparse.ArgumentParser) -> None:
    """``--repair``, ``--norm-rescale`` and what they need."""
    group = parser.add_argument_group("repair in closed form (alone, or under torchrun)")
    group.add_argument(
        "--repair", action="store_true", help="least squares on linear_proj and linear_fc2"
    )
    group.add_argument(
        "--norm-rescale", action="store_true", help="adapt norm weights to fewer hidden channels"
    )
    add_calibration_arguments(group)
    group.add_argument(
        "--repair-damping",
        type=float,
        metavar="X",
        help="default by target: " + ", ".join(f"{name} {x}" for name, x in DAMPING.items()),
    )
    group.add_argument(
        "--repair-statistics",
        choices=STATISTICS,
        default=STATISTICS[0],
        help="inputs as the repaired layers make them, or as the dense model does",
    )
    group.add_argument(
        "--repair-target",
        choices=FIT_TARGETS,
        help="output to fit: the layer's own with all its parts, the dense model's, or what brings "
        "the hidden state to the dense model's (default: stream for a plan that drops hidden "
        "channels or layers, else own)",
    )
    group.add_argument(
        "--repair-readers",
        action=argparse.BooleanOptionalAction,
        help="with --repair, refit linear_qkv and linear_fc1 too: from the kept hidden channels to "
        "what the dense model's would read (default: with target stream)",
    )
    group.add_argument(
        "--repair-readers-damping",
        type=float,
        default=READERS_DAMPING,
        metavar="X",
        help=f"default {READERS_DAMPING}",
    )
    group.add_argument(
        "--repair-tensor-parallel-size",
        type=options.positive,
        metavar="N",
        help="ranks that share a layer; all others take other windows (default: the target's "
        "TP, where it divides ranks and source, else 1)",
    )


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A repaired model, while its scratch files are there."""

    source: Source
    record: Repair
    ranks: Ranks


def check_repair(args: argparse.Namespace) -> bool:
    """Whether a repair is asked for; refuses flags that do not go together, before any file.

    Raises:
        ConfigError: see the messages.
    """
    if not (args.repair or args.norm_rescale):
        defaults = argparse.ArgumentParser()
        add_repair_arguments(defaults)
        for name, default in vars(defaults.parse_args([])).items():
            if getattr(args, name) != default:
                raise ConfigError(
                    f"--{name.replace('_', '-')} without --repair or --norm-rescale: nothing would "
                    "use it"
                )
        return False
    if args.repair and args.data is None:
        raise ConfigError("--repair without --data: it needs text to calibrate on")
    if args.data is None and args.scores is None:
        raise ConfigError(
            "--norm-rescale without --data or --scores: it needs text to calibrate on, or the "
            "statistics that `score` keeps"
        )
    for flag in ("repair_damping", "repair_readers_damping"):
        value = getattr(args, flag)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{flag.replace('_', '-')} {value}: wanted 0 or more")
    if args.repair_readers and args.repair_statistics == "dense":
        raise ConfigError(
            "--repair-statistics dense fits from the dense model's own state; --repair-readers "
            "needs sequential"
        )
    if args.repair_statistics == "dense" and args.repair_target not in (None, "own"):
        raise ConfigError(
            f"--repair-statistics dense fits the dense model's own output; --repair-target "
            f"{args.repair_target} needs sequential"
        )
    for path in (args.data, args.tokenizer_model):
        if path is not None and not path.exists():
            raise ConfigError(f"{path}: is not there")
    return True


@contextmanager
def repaired(args: argparse.Namespace, source: Source, plan: PrunePlan) -> Iterator[Repaired]:
    """The pruned model with its repair; process groups and scratch files live for the block.

    Raises:
        ConfigError: data, tokenizer or options that do not fit; nothing to repair.
    """
    from megatron_prune.engine.forward.model import ModelOptions, check_model

    fit, rescales = _to_do(args, plan)
    energy = _energy_of_scores(args, plan) if rescales else None
    grid = calibration_grid(args.repair_tensor_parallel_size, args, source)
    model = ModelOptions(
        seq_length=args.seq_length or longest_window(source),
        dtype="bf16" if args.bf16 else "fp32",
    )
    grid.check(source.config.shape)
    check_model(source.config, model, grid.tensor_parallel)
    with process_groups(args, grid) as groups:
        options.agree_on_arguments(groups.ranks, args)
        options.say(
            f"repairs at TP={grid.tensor_parallel} DP={groups.data_parallel}, {model.dtype}"
            + ("" if fit is None else f", {fit}")
        )
        with scratch_directory(args.save, ranks=groups.ranks) as scratch:
            tensors = Tensors(scratch)
            record = _run(args, source, plan, fit, rescales, energy, model, groups, tensors)
            pruned = RepairedSource(PrunedSource(source, plan), tensors)
            yield Repaired(source=pruned, record=record, ranks=groups.ranks)


def _to_do(args: argparse.Namespace, plan: PrunePlan) -> tuple[Fit | None, bool]:
    """What is asked for and has lost something: how to fit weights, whether to scale norms."""
    fit, rescales = None, args.norm_rescale and plan.kept.hidden is not None
    if args.repair:
        fit = Fit.for_plan(
            plan,
            target=args.repair_target,
            readers=args.repair_readers,
            damping=args.repair_damping,
            readers_damping=args.repair_readers_damping,
            statistics=args.repair_statistics,
        )
        if not fit.fits(plan):
            options.say("--repair: the plan drops no heads and no FFN channels; nothing to fit")
            fit = None
    if args.norm_rescale and not rescales:
        options.say("--norm-rescale: the plan keeps all hidden channels; nothing to rescale")
    if fit is None and not rescales:
        raise ConfigError(
            "nothing to repair: --repair is for plans that drop something, --norm-rescale for "
            "those that drop hidden channels; leave them out"
        )
    return fit, rescales


def _energy_of_scores(args: argparse.Namespace, plan: PrunePlan) -> Tensor | None:
    """The norms' energies from ``--scores``, None where they are to be observed."""
    if args.scores is None:
        return None
    scores: Scores = load_scores(args.scores)
    if scores.source_digest != plan.source_digest:
        raise PlanError(
            f"--scores {args.scores}: of another model (its digest is "
            f"{scores.source_digest[:12]}..., the plan's source {plan.source_digest[:12]}...)"
        )
    found = scores.statistics.get("norm_energy")
    wanted = (2 * plan.source.num_layers + 1, plan.source.hidden_size)
    if found is not None and tuple(found.shape) == wanted:
        return found
    if args.data is None:
        raise ConfigError(
            f"--scores {args.scores}: has no norm_energy {wanted} for --norm-rescale; score again, "
            "or give --data"
        )
    return None


def _run(
    args: argparse.Namespace,
    source: Source,
    plan: PrunePlan,
    fit: Fit | None,
    rescales: bool,
    energy: Tensor | None,
    model: ModelOptions,
    groups: Groups,
    tensors: Tensors,
) -> Repair:
    from megatron_prune.data.windows import data_digest
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.observe.layerwise import norm_energy
    from megatron_prune.engine.repair import repair_projections, rescale_norms

    observes_norms = rescales and energy is None
    windows = torch.empty(0, model.seq_length, dtype=torch.int64)
    if observes_norms or fit is not None:
        windows = on_first_rank(
            groups.ranks, lambda: calibration_windows(args, source, model.seq_length)
        )
    done: dict[str, Replaced] = {}
    passes = plan.source.num_layers * observes_norms
    passes += plan.target.num_layers * (fit is not None)
    quiet = not groups.ranks.is_first
    with tqdm(total=passes, desc="repair", unit="layer", disable=quiet, file=sys.stderr) as bar:
        if observes_norms:
            energy = norm_energy(source, windows, groups, model, bar.update)
        if rescales:
            assert energy is not None
            done |= rescale_norms(source, plan, energy, groups, tensors)
        if fit is not None:
            done |= repair_projections(
                source, plan, windows, fit, model, groups, tensors, done, bar.update
            )
    settings: dict[str, Any] = {
        "norm_rescale": rescales,
        "least_squares": fit is not None,
        **({} if fit is None else asdict(fit)),
        "norm_energy_from": "data" if observes_norms else "scores" if rescales else None,
        "dtype": model.dtype,
        "data_digest": data_digest(windows),
        "samples": len(windows),
        "seq_length": model.seq_length,
        "tokens": windows.numel(),
    }
    return Repair(
        plan_digest=plan.digest,
        source_digest=plan.source_digest,
        settings=settings,
        tensors=done,
    )


def show_repair(record: Repair) -> None:
    """One line a kind: how many tensors, and what it did to them."""
    fitted = {
        how: [t for n, t in record.tensors.items() if t.how == how and n.endswith(".weight")]
        for how in _FITTED
    }
    ratios = [t.ratio for t in record.tensors.values() if t.ratio is not None]
    if ratios:
        options.show(f"rescaled {len(ratios)} norms by {min(ratios):.4f} to {max(ratios):.4f}")
    for how, tensors in fitted.items():
        if tensors:
            before = sum(t.error_before or 0 for t in tensors) / len(tensors)
            after = sum(t.error_after or 0 for t in tensors) / len(tensors)
            options.show(
                f"refitted {len(tensors)} {_FITTED[how]} {before:.4f} -> {after:.4f} on average"
            )
