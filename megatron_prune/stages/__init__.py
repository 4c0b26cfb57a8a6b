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

# function -> its module, in the order of the walk; its options lie there too
MODULES = {
    "inspect": "inspection",
    "convert": "conversion",
    "score": "scoring",
    "profile": "profiling",
    "plan": "planning",
    "prune": "pruning",
    "reshard": "resharding",
    "verify": "verification",
    "vocab_count": "vocab_counting",
    "vocab_plan": "vocab_planning",
    "vocab_prune": "vocab_pruning",
    "preprocess": "preprocessing",
    "train": "training",
    "evaluate": "evaluation",
    "generate": "generation",
    "report": "reporting",
}


def options_name(stage: str) -> str:
    """``vocab_count`` -> ``VocabCountOptions``."""
    return "".join(word.title() for word in stage.split("_")) + "Options"


_PLACES = MODULES | {options_name(stage): module for stage, module in MODULES.items()}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
