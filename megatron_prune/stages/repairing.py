"""The flags of ``prune`` that repair what was cut, and the run behind them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.flags import Group, flag, flag_name, given_flags, positive
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.planning.fit import DAMPING, FIT_TARGETS, READERS_DAMPING, STATISTICS, Fit
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import load_scores
from megatron_prune.ranks import Ranks
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.repair_record import Repair, Replaced
from megatron_prune.sources.replaced import RepairedSource, Tensors
from megatron_prune.sources.source import Source
from megatron_prune.stages.calibration import CALIBRATION, LayerwiseCalibration
from megatron_prune.stages.common import agree_on_start
from megatron_prune.stages.console import Console
from megatron_prune.stages.deciding import PlanFlags
from megatron_prune.store.commit import scratch_directory

if TYPE_CHECKING:
    from megatron_prune.engine.forward.model import ModelOptions
    from megatron_prune.engine.groups import Groups

REPAIR = Group("repair in closed form (alone, or under torchrun)")
_FITTED = {
    "least-squares": "projections: relative error of their outputs",
    "readers": "weights that read a norm: relative error of the state they read",
}


@dataclass(frozen=True, kw_only=True)
class RepairFlags(LayerwiseCalibration, PlanFlags):
    """Of a stage that can repair what it prunes."""

    repair: bool = flag("least squares on linear_proj and linear_fc2", default=False, group=REPAIR)
    norm_rescale: bool = flag(
        "adapt norm weights to fewer hidden channels", default=False, group=REPAIR
    )
    repair_damping: float | None = flag(
        "of the least squares (default: by target "
        + ", ".join(f"{name} {x}" for name, x in DAMPING.items())
        + ")",
        default=None,
        metavar="X",
        group=REPAIR,
    )
    repair_statistics: str = flag(
        "inputs as the repaired layers make them, or as the dense model does",
        default=STATISTICS[0],
        choices=STATISTICS,
        group=REPAIR,
    )
    repair_target: str | None = flag(
        "output to fit: the layer's own with all its parts, the dense model's, or what brings "
        "the hidden state to the dense model's (default: stream for a plan that drops hidden "
        "channels or layers, else own)",
        default=None,
        choices=FIT_TARGETS,
        group=REPAIR,
    )
    repair_readers: bool | None = flag(
        "with --repair, refit linear_qkv and linear_fc1 too: from the kept hidden channels to "
        "what the dense model's would read (default: with target stream)",
        default=None,
        group=REPAIR,
    )
    repair_readers_damping: float = flag(
        "of those", default=READERS_DAMPING, metavar="X", group=REPAIR
    )
    repair_tensor_parallel_size: int | None = flag(
        "ranks that share a layer; all others take other windows (default: the target's "
        "TP, where it divides ranks and source, else 1)",
        default=None,
        parse=positive,
        metavar="N",
        group=REPAIR,
    )

    def asks_for_repair(self) -> bool:
        """Whether a repair is asked for; refuses flags that do not go together, before any file.

        Raises:
            ConfigError: see the messages.
        """
        if not (self.repair or self.norm_rescale):
            for name in given_flags(self, CALIBRATION, REPAIR):
                raise ConfigError(
                    f"{name} without --repair or --norm-rescale: nothing would use it"
                )
            return False
        if self.repair and self.data is None:
            raise ConfigError("--repair without --data: it needs text to calibrate on")
        if self.data is None and self.scores is None:
            raise ConfigError(
                "--norm-rescale without --data or --scores: it needs text to calibrate on, or the "
                "statistics that `score` keeps"
            )
        for name in ("repair_damping", "repair_readers_damping"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{flag_name(name)} {value}: wanted 0 or more")
        if self.repair_readers and self.repair_statistics == "dense":
            raise ConfigError(
                "--repair-statistics dense fits from the dense model's own state; --repair-readers "
                "needs sequential"
            )
        if self.repair_statistics == "dense" and self.repair_target not in (None, "own"):
            raise ConfigError(
                f"--repair-statistics dense fits the dense model's own output; --repair-target "
                f"{self.repair_target} needs sequential"
            )
        self.check_files()
        return True


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """A repaired model, while its scratch files are there."""

    source: Source
    record: Repair
    ranks: Ranks


@contextmanager
def repaired(
    options: RepairFlags, save: Path, source: Source, plan: PrunePlan, console: Console
) -> Iterator[Repaired]:
    """The pruned model with its repair; process groups and scratch files live for the block.

    Args:
        save: what the scratch files lie beside.

    Raises:
        ConfigError: data, tokenizer or options that do not fit; nothing to repair.
    """
    from megatron_prune.engine.groups import model_parallel

    fit, rescales = _to_do(options, plan, console)
    energy = _energy_of_scores(options, plan) if rescales else None
    model, grid = options.calibration_run(source, options.repair_tensor_parallel_size)
    timeout = options.distributed_timeout_minutes
    with model_parallel(grid, timeout_minutes=timeout) as groups:
        agree_on_start(groups.ranks, options, source)
        console.say(
            f"repairs at TP={grid.tensor_parallel} DP={groups.data_parallel}, {model.dtype}"
            + ("" if fit is None else f", {fit}")
        )
        with scratch_directory(save, ranks=groups.ranks) as scratch:
            tensors = Tensors(scratch)
            record = _run(
                options, source, plan, fit, rescales, energy, model, groups, tensors, console
            )
            pruned = RepairedSource(PrunedSource(source, plan), tensors)
            yield Repaired(source=pruned, record=record, ranks=groups.ranks)


def _to_do(options: RepairFlags, plan: PrunePlan, console: Console) -> tuple[Fit | None, bool]:
    """What is asked for and has lost something: how to fit weights, whether to scale norms."""
    fit, rescales = None, options.norm_rescale and plan.kept.hidden is not None
    if options.repair:
        fit = Fit.for_plan(
            plan,
            target=options.repair_target,
            readers=options.repair_readers,
            damping=options.repair_damping,
            readers_damping=options.repair_readers_damping,
            statistics=options.repair_statistics,
        )
        if not fit.fits(plan):
            console.say("--repair: the plan drops no heads and no FFN channels; nothing to fit")
            fit = None
    if options.norm_rescale and not rescales:
        console.say("--norm-rescale: the plan keeps all hidden channels; nothing to rescale")
    if fit is None and not rescales:
        raise ConfigError(
            "nothing to repair: --repair is for plans that drop something, --norm-rescale for "
            "those that drop hidden channels; leave them out"
        )
    return fit, rescales


def _energy_of_scores(options: RepairFlags, plan: PrunePlan) -> Tensor | None:
    """The norms' energies from ``--scores``, None where they are to be observed."""
    if options.scores is None:
        return None
    scores = load_scores(options.scores)
    if scores.source_digest != plan.source_digest:
        raise PlanError(
            f"--scores {options.scores}: of another model (its digest is "
            f"{scores.source_digest[:12]}..., the plan's source {plan.source_digest[:12]}...)"
        )
    found = scores.statistics.get("norm_energy")
    wanted = (2 * plan.source.num_layers + 1, plan.source.hidden_size)
    if found is not None and tuple(found.shape) == wanted:
        return found
    if options.data is None:
        raise ConfigError(
            f"--scores {options.scores}: has no norm_energy {wanted} for --norm-rescale; score "
            "again, or give --data"
        )
    return None


def _run(
    options: RepairFlags,
    source: Source,
    plan: PrunePlan,
    fit: Fit | None,
    rescales: bool,
    energy: Tensor | None,
    model: ModelOptions,
    groups: Groups,
    tensors: Tensors,
    console: Console,
) -> Repair:
    from megatron_prune.data.windows import data_digest
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.observe.layerwise import norm_energy
    from megatron_prune.engine.repair import repair_projections, rescale_norms

    observes_norms = rescales and energy is None
    windows = torch.empty(0, model.seq_length, dtype=torch.int64)
    if observes_norms or fit is not None:
        windows = on_first_rank(
            groups.ranks, lambda: options.windows(source, model.seq_length, console)
        )
    done: dict[str, Replaced] = {}
    passes = plan.source.num_layers * observes_norms
    passes += plan.target.num_layers * (fit is not None)
    with console.bar("repair", unit="layer") as bar:
        progress = bar(passes)
        if observes_norms:
            energy = norm_energy(source, windows, groups, model, progress)
        if rescales:
            assert energy is not None
            done |= rescale_norms(source, plan, energy, groups, tensors)
        if fit is not None:
            done |= repair_projections(
                source, plan, windows, fit, model, groups, tensors, done, progress
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


def repair_lines(record: Repair) -> Iterator[str]:
    """One a kind: how many tensors, and what it did to them."""
    ratios = [t.ratio for t in record.tensors.values() if t.ratio is not None]
    if ratios:
        yield f"rescaled {len(ratios)} norms by {min(ratios):.4f} to {max(ratios):.4f}"
    for how, what in _FITTED.items():
        tensors = [t for n, t in record.tensors.items() if t.how == how and n.endswith(".weight")]
        if tensors:
            before = sum(t.error_before or 0 for t in tensors) / len(tensors)
            after = sum(t.error_after or 0 for t in tensors) / len(tensors)
            yield f"refitted {len(tensors)} {what} {before:.4f} -> {after:.4f} on average"
