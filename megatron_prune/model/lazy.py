"""torch and numpy, imported when something of them is first used.

    from megatron_prune.model.lazy import torch

Their import takes two seconds of CPU time, more than all else that ``--help`` or the refusal of a
flag does. Modules that a command imports before its flags are known to be good have them from here,
and use nothing of them while they are imported themselves.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import Tensor
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module(self._name), name)

    np, torch, dist = _Lazy("numpy"), _Lazy("torch"), _Lazy("torch.distributed")
    Tensor = "torch.Tensor"  # for annotations alone: isinstance takes torch.Tensor
