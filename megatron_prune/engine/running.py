"""How a model is run, as flags; what it is, is its `ModelConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.flags import Group, flag

PROCESSES = Group("processes, precision and layers", is_last=True)


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
