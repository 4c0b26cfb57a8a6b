"""The Megatron runtime: the only package that imports ``megatron.core``.

One code path for NCCL with Transformer Engine and for gloo on a CPU (`cpu` has what the latter
needs). Nothing here knows about pruning. Importing it keeps Megatron's advice about packages that
are not installed off standard error, which it gives while it is imported.
"""

import logging
import warnings

warnings.filterwarnings("ignore", message=r".*(Apex|Transformer Engine).*")
for _module in (r"megatron\..*", r"torch\.distributed\..*"):
    warnings.filterwarnings("ignore", module=_module)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron_prune\.engine\.cpu")
for _name in ("megatron", "torch.distributed"):
    logging.getLogger(_name).setLevel(logging.ERROR)
