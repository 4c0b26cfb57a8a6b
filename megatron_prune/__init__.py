"""megatron_prune: prune large language models on their tensor- and pipeline-parallel shards.

What is promised to those who import it is in ``__all__``, and shown in docs/python.md; each part is
imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "errors", "open_source", "stages"]


def __getattr__(name: str) -> Any:
    if name == "open_source":
        return importlib.import_module("megatron_prune.store").open_source
    if name in __all__:
        return importlib.import_module(f"megatron_prune.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
