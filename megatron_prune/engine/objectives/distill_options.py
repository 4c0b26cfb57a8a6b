"""What a run with a teacher is asked to do, and every check of it that needs no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.engine.objectives.divergence import Softening
from megatron_prune.errors import ConfigError
from megatron_prune.model.grid import ParallelGrid


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The teachers of a run; see ``megatron-prune train --help`` for each field.

    By default the divergence of the logits alone: Minitron, arXiv:2407.14679, found the
    language-model loss to add nothing to it when a pruned model learns from its source.

    Attributes:
        teacher_weights: None for equal ones; any positive numbers, of which the share counts.
        hidden_layers: (student's layer, teacher's layer), whose outputs are compared; from 0.
    """

    teachers: tuple[Path, ...]
    teacher_weights: tuple[float, ...] | None = None
    lm_weight: float = 0.0
    temperature: float = 1.0
    top_k: int | None = None
    hidden_weight: float = 0.0
    hidden_layers: tuple[tuple[int, int], ...] = ()

    @property
    def softening(self) -> Softening:
        given = self.teacher_weights or (1.0,) * len(self.teachers)
        return Softening(
            lm_weight=self.lm_weight,
            temperature=self.temperature,
            top_k=self.top_k,
            teacher_weights=tuple(weight / sum(given) for weight in given),
        )


def parse_layers(text: str) -> tuple[tuple[int, int], ...]:
    """``STUDENT:TEACHER,...`` as ``--distill-hidden-layers`` takes it.

    Raises:
        ConfigError: not pairs of numbers from 0.
    """
    pairs = [part.split(":") for part in text.split(",")]
    if any(len(pair) != 2 or not all(n.strip().isdecimal() for n in pair) for pair in pairs):
        raise ConfigError(
            f"--distill-hidden-layers {text!r}; wanted STUDENT:TEACHER,... such as 3:7,11:23"
        )
    return tuple((int(student), int(teacher)) for student, teacher in pairs)


def check_distill(
    options: DistillOptions, grid: ParallelGrid, recompute_granularity: str | None
) -> None:
    """Refuse what cannot work, before any file is opened.

    Raises:
        ConfigError: with the flag, its value and what was wanted.
    """
    if not 0 <= options.lm_weight <= 1:
        raise ConfigError(f"--distill-lm-weight is {options.lm_weight}; wanted 0 to 1")
    if not 0 < options.temperature < math.inf:
        raise ConfigError(f"--distill-temperature is {options.temperature}; wanted more than 0")
    if options.top_k is not None and options.top_k < 1:
        raise ConfigError(f"--distill-top-k is {options.top_k}; wanted 1 or more")
    _check_weights(options.teacher_weights, len(options.teachers))
    if not 0 <= options.hidden_weight < math.inf:
        raise ConfigError(f"--distill-hidden-weight is {options.hidden_weight}; wanted 0 or more")
    if bool(options.hidden_weight) != bool(options.hidden_layers):
        raise ConfigError("--distill-hidden-weight and --distill-hidden-layers: give both or none")
    if not options.hidden_layers:
        return
    if len(options.teachers) > 1:
        raise ConfigError(
            f"--distill-hidden-layers with {len(options.teachers)} teachers; wanted one --teacher"
        )
    if grid.pipeline_parallel > 1:
        raise ConfigError(
            "--distill-hidden-layers compares layers that may lie on different pipeline stages; "
            f"found --pipeline-model-parallel-size {grid.pipeline_parallel}, wanted 1"
        )
    if recompute_granularity == "full":
        raise ConfigError(
            "--distill-hidden-layers keeps what --recompute-granularity full drops; use selective"
        )


def _check_weights(weights: Sequence[float] | None, teachers: int) -> None:
    if weights is None:
        return
    told = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != teachers:
        raise ConfigError(
            f"--teacher-weights {told}: {len(weights)} for {teachers} teachers; give one each"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"--teacher-weights {told}: every weight must be more than 0")
