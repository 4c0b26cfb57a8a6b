"""What a training run leaves beside its model in a torch_dist checkpoint.

The optimizer's state is tensors under keys of its own, of the shapes of the weights they belong to
and like them independent of the layout; counters, schedule and the rest lie in ``common.pt``.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_prune.errors import DamagedError
from megatron_prune.model.lora import is_factor
from megatron_prune.store.dist_chunks import ChunkFiles
from megatron_prune.store.dist_index import Chunk, read_index
from megatron_prune.store.megatron import is_of_the_model
from megatron_prune.store.untrusted import load_untrusted

COMMON = "common.pt"

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


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A run as it was saved, to be written again beside its model in another layout.

    Attributes:
        iteration: the steps it has made.
        common: its part of ``common.pt``.
        arguments: those of its arguments that say how it trained.
        chunks: of the optimizer's tensors and others beside the model's, by the file they lie in:
            key, whole shape, chunk.
        files: those files.
    """

    iteration: int
    common: Mapping[str, Any]
    arguments: Mapping[str, Any]
    chunks: Mapping[str, list[tuple[str, tuple[int, ...], Chunk]]]
    files: ChunkFiles

    @property
    def bytes(self) -> int:
        parts = (chunk for chunks in self.chunks.values() for _, _, chunk in chunks)
        return sum(prod(chunk.sizes) * chunk.dtype.itemsize for chunk in parts)


_COMMON = ("optimizer", "opt_param_scheduler", "num_floating_point_operations_so_far", STATE)
_ARGUMENTS = (
    "consumed_train_samples",
    "seq_length",
    "micro_batch_size",
    "global_batch_size",
    "use_distributed_optimizer",
)


def saved_run(directory: Path) -> SavedRun | None:
    """The run that a torch_dist checkpoint belongs to.

    Returns:
        None where there is none of ours, or one of low-rank factors: they are part of the model as
        it is read, and their optimizer's state belongs to nothing then.

    Raises:
        DamagedError: what is there cannot be read, or is none of a run.
    """
    common = load_untrusted(directory / COMMON, mmap=False)
    state, index = state_in(common, directory / COMMON), read_index(directory)
    if state is None or any(map(is_factor, index.tensors)):
        return None
    beside = {key: of for key, of in index.tensors.items() if not is_of_the_model(key)}
    chunks: dict[str, list[tuple[str, tuple[int, ...], Chunk]]] = {}
    for key, (whole, parts) in sorted({**beside, **index.optimizer}.items()):
        for chunk in parts:
            chunks.setdefault(chunk.file, []).append((key, whole, chunk))
    args = common.get("args")
    said = vars(args) if isinstance(args, Namespace) else {}
    return SavedRun(
        iteration=state["iteration"],
        common={key: common[key] for key in _COMMON if key in common},
        arguments={key: said[key] for key in _ARGUMENTS if type(said.get(key)) in (int, bool)},
        chunks=dict(sorted(chunks.items())),
        files=ChunkFiles(directory, index),
    )
