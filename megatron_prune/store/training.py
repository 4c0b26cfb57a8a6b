"""What a training run leaves beside its model, in ``common.pt`` of a torch_dist checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError

STATE = "training"  # our key in common.pt: what a run continues with
_KINDS: dict[str, type] = {
    "iteration": int,
    "consumed_samples": int,
    "dtype": str,
    "use_distributed_optimizer": bool,
}


def state_in(common: Any, where: Path) -> Mapping[str, Any] | None:
    """What a run continues with; None in a checkpoint that is a model only, or stock Megatron's.

    Raises:
        DamagedError: it lacks what every run of ours has written.
    """
    state = common.get(STATE) if isinstance(common, dict) else None
    if state is None:
        return None
    found = state if isinstance(state, dict) else {}
    for name, kind in _KINDS.items():
        value = found.get(name)
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise DamagedError(
                f"{where}: its training state has {name} {str(value)[:40]!r}; wanted a "
                f"{kind.__name__}; restore another checkpoint of the run"
            )
    return found
