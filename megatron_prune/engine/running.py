"""How a model is run, as flags; what it is, is its `ModelConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.flags import Group, flag, minutes, positive
from megatron_prune.model.grid import Layout

PROCESSES = Group("processes, precision and layers", is_last=True)
CALIBRATION = Group("calibration")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Of everything that runs a model: precision and kind of layers."""

    sequence_parallel: bool = flag(
        "split norms over tensor-parallel ranks", default=False, group=PROCESSES
    )
    dtype: str = flag(
        default="fp32",
        switches={"bf16": "run in bfloat16 (default: fp32)", "fp16": "run in float16"},
        group=PROCESSES,
    )
    transformer_impl: str = flag(
        "auto: Transformer Engine where it is installed and a GPU is there",
        default="auto",
        choices=("auto", "local", "transformer_engine"),
        group=PROCESSES,
    )


@dataclass(frozen=True, kw_only=True)
class Engine(Runs, Layout):
    """Of a stage that runs a model on the processes that were started."""

    distributed_timeout_minutes: float = flag(
        "give up on a silent rank after this long",
        default=10,
        parse=minutes,
        metavar="M",
        group=PROCESSES,
    )


@dataclass(frozen=True, kw_only=True)
class ScoreRuns:
    """Of everything that scores: how calibration text is run."""

    micro_batch_size: int = flag(
        "samples at once", default=1, parse=positive, metavar="N", group=CALIBRATION
    )
    removal_samples: int = flag(
        "samples of perplexity: it runs them once for each layer",
        default=8,
        parse=positive,
        metavar="N",
        group=CALIBRATION,
    )
    removal_layers: int | None = flag(
        "layers that perplexity-greedy removes (default: a quarter)",
        default=None,
        parse=positive,
        metavar="N",
        group=CALIBRATION,
    )
