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

# module -> what it promises
_MODULES = {
    "inspection": ("inspect", "InspectOptions"),
    "conversion": ("convert", "ConvertOptions"),
    "scoring": ("score", "ScoreOptions"),
    "profiling": ("profile", "ProfileOptions"),
    "planning": ("plan", "PlanOptions"),
    "pruning": ("prune", "PruneOptions"),
    "sparsifying": ("sparsify", "SparsifyOptions"),
    "resharding": ("reshard", "ReshardOptions"),
    "verification": ("verify", "VerifyOptions"),
    "vocab_counting": ("vocab_count", "VocabCountOptions"),
    "vocab_planning": ("vocab_plan", "VocabPlanOptions"),
    "vocab_pruning": ("vocab_prune", "VocabPruneOptions"),
    "preprocessing": ("preprocess", "PreprocessOptions"),
    "training": ("train", "TrainOptions"),
    "shearing": ("shear", "ShearOptions"),
    "evaluation": ("evaluate", "EvaluateOptions"),
    "generation": ("generate", "GenerateOptions"),
    "reporting": ("report", "ReportOptions"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
