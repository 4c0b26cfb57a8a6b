"""What a run with a teacher is asked to do, and every check of it that needs no file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError
from megatron_prune.flags import Group, flag, flag_name, given, positive
from megatron_prune.model.grid import ParallelGrid

if TYPE_CHECKING:
    from megatron_prune.engine.objectives.divergence import Softening

_DISTILLATION = Group(
    "distillation",
    "The loss is W x LM loss + (1 - W) x T^2 x KL(teacher || student), W the LM weight.",
    is_last=True,
)


@dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The teachers of a run; see ``megatron-prune train --help`` for each field.

    By default the divergence of the logits alone: Minitron, arXiv:2407.14679, found the
    language-model loss to add nothing to it when a pruned model learns from its source.

    Attributes:
        teacher_weights: any positive numbers, of which the share counts.
    """

    teacher: tuple[Path, ...] = flag(
        "learn from these models' predictions; any format and layout",
        default=(),
        group=_DISTILLATION,
        metavar="CKPT",
    )
    teacher_weights: tuple[float, ...] = flag(
        "of several teachers' probabilities in their mixture (default: equal)",
        default=(),
        group=_DISTILLATION,
        metavar="W",
    )
    distill_lm_weight: float = flag(
        "share of the LM loss; 0: the logits alone", default=0.0, group=_DISTILLATION, metavar="W"
    )
    distill_temperature: float = flag(
        "divides the logits of both", default=1.0, group=_DISTILLATION, metavar="T"
    )
    distill_top_k: int | None = flag(
        "the teacher's K likeliest tokens, the rest as one (default: all)",
        default=None,
        group=_DISTILLATION,
        metavar="K",
        parse=positive,
    )
    distill_hidden_weight: float = flag(
        "of 1 - cosine of hidden states, added", default=0.0, group=_DISTILLATION, metavar="W"
    )
    distill_hidden_layers: str | None = flag(
        "layers, from 0, whose outputs are compared",
        default=None,
        group=_DISTILLATION,
        metavar="STUDENT:TEACHER,...",
    )

    @property
    def distill(self) -> DistillOptions | None:
        """These options; None without a teacher.

        Raises:
            ConfigError: an option that needs ``--teacher``.
        """
        if self.teacher:
            return self
        for name in given(self, DistillOptions):
            raise ConfigError(
                f"{flag_name(name)} needs --teacher CKPT: there is nothing to learn from"
            )
        return None

    @property
    def hidden_layers(self) -> tuple[tuple[int, int], ...]:
        """(student's layer, teacher's layer), whose outputs are compared; from 0.

        Raises:
            ConfigError: not pairs of numbers from 0.
        """
        if self.distill_hidden_layers is None:
            return ()
        pairs = [part.split(":") for part in self.distill_hidden_layers.split(",")]
        if any(len(pair) != 2 or not all(n.strip().isdecimal() for n in pair) for pair in pairs):
            raise ConfigError(
                f"--distill-hidden-layers {self.distill_hidden_layers!r}; wanted "
                "STUDENT:TEACHER,... such as 3:7,11:23"
            )
        return tuple((int(student), int(teacher)) for student, teacher in pairs)

    @property
    def softening(self) -> Softening:
        from megatron_prune.engine.objectives.divergence import Softening

        weights = self.teacher_weights or (1.0,) * len(self.teacher)
        return Softening(
            lm_weight=self.distill_lm_weight,
            temperature=self.distill_temperature,
            top_k=self.distill_top_k,
            teacher_weights=tuple(weight / sum(weights) for weight in weights),
        )


def check_distill(
    options: DistillOptions, grid: ParallelGrid, recompute_granularity: str | None
) -> None:
    """Refuse what cannot work, before any file is opened.

    Raises:
        ConfigError: with the flag, its value and what was wanted.
    """
    if not 0 <= options.distill_lm_weight <= 1:
        raise ConfigError(f"--distill-lm-weight is {options.distill_lm_weight}; wanted 0 to 1")
    if not 0 < options.distill_temperature < math.inf:
        raise ConfigError(
            f"--distill-temperature is {options.distill_temperature}; wanted more than 0"
        )
    if options.distill_top_k is not None and options.distill_top_k < 1:
        raise ConfigError(f"--distill-top-k is {options.distill_top_k}; wanted 1 or more")
    _check_weights(options.teacher_weights, len(options.teacher))
    if not 0 <= options.distill_hidden_weight < math.inf:
        raise ConfigError(
            f"--distill-hidden-weight is {options.distill_hidden_weight}; wanted 0 or more"
        )
    if bool(options.distill_hidden_weight) != bool(options.hidden_layers):
        raise ConfigError("--distill-hidden-weight and --distill-hidden-layers: give both or none")
    if not options.hidden_layers:
        return
    if len(options.teacher) > 1:
        raise ConfigError(
            f"--distill-hidden-layers with {len(options.teacher)} teachers; wanted one --teacher"
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


def _check_weights(weights: Sequence[float], teachers: int) -> None:
    if not weights:
        return
    told = " ".join(f"{weight:g}" for weight in weights)
    if len(weights) != teachers:
        raise ConfigError(
            f"--teacher-weights {told}: {len(weights)} for {teachers} teachers; give one each"
        )
    if not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(f"--teacher-weights {told}: every weight must be more than 0")
