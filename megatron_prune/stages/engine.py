"""What a stage that runs a model is asked beyond it: the layout, and when to give up on a rank."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.engine.running import PROCESSES, Runs
from megatron_prune.flags import flag
from megatron_prune.stages.common import Layout


@dataclass(frozen=True, kw_only=True)
class Engine(Runs, Layout):
    """Of a stage that runs a model on the processes that were started."""

    distributed_timeout_minutes: float = flag(
        "give up on a silent rank after this long", default=10, metavar="M", group=PROCESSES
    )
