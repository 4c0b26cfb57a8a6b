"""The stages of the walk, callable: each a function and the dataclass of its options.

    from megatron_prune import stages
    stages.reshard(stages.ReshardOptions(load=Path("ckpt-tp8"), save=Path("ckpt-tp2"), ...))

What the command line, the tests, a notebook and another project call is the same function. It
returns what it found, raises one of `megatron_prune.errors`, and is silent unless it is handed a
`Console`. A stage's file is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

# what is promised -> the module that has it
_PLACES = {
    "inspect": "inspection",
    "InspectOptions": "inspection",
    "reshard": "resharding",
    "ReshardOptions": "resharding",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
