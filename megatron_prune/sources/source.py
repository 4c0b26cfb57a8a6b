"""A source: any model whose tensors can be read one at a time, by canonical name.

Every store opens as one; a pruned model (`surgery.PrunedSource`) is one too, so converting,
pruning, resharding and checking are the same loop over different sources. `read` gives a view of a
memory map where it can; nothing is held between two reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import axes_of, split_dim
from megatron_prune.model.fusion import Piece
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lora import Lora
from megatron_prune.model.shape import ModelConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPAIR = "repair.json"  # beside the plan
CARD = "README.md"  # the model card
VOCAB_PLAN = "vocab_plan.json"  # of a model whose tokenizer was pruned: travels with its files
COMMANDS = "commands.jsonl"  # of a training run: beside its checkpoints; then it travels with them
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Held(Protocol):
    """A lock on something that is read."""

    def release(self) -> None: ...


class Source(ABC):
    """A model to read: its config, where its companions lie, and its tensors.

    Attributes:
        path: directory the model was opened from, for messages.
        config: the model's facts, true vocabulary.
        grid: the layout it is stored in (1 x 1 for Hugging Face).
        companion_files: relative name -> path of the files that travel along with a model: config,
            generation config, tokenizer.
        plan_path: the plan this model was pruned with, None when it was not.
        iteration: the number in the name of the checkpoint's directory, 0 for Hugging Face.
        has_optimizer_state: training state lies beside the weights; it is never read here.
        held: what keeps it from being removed while it is open.
        lora: of the factors that `read` adds to what is stored, None where there are none.
    """

    path: Path
    format: str
    config: ModelConfig
    grid: ParallelGrid = ParallelGrid()
    companion_files: dict[str, Path]
    plan_path: Path | None = None
    iteration: int = 0
    has_optimizer_state: bool = False
    held: Held | None = None
    lora: Lora | None = None

    @property
    def repair_path(self) -> Path | None:
        """The record of the model's repair, which lies beside its plan; None when there is none."""
        path = None if self.plan_path is None else self.plan_path.with_name(REPAIR)
        return path if path is not None and path.is_file() else None

    @abstractmethod
    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Indices ``[start, stop)`` of the tensor's split axis (all of a replicated tensor).

        The numbers count heads on Q, groups on K, channels on F, token ids on V. May be a view of
        a memory map: never write to it.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype, without reading it."""

    @property
    def stored_vocab_size(self) -> int:
        """Rows of the embedding where it lies, padding included."""
        return self.config.shape.vocab_size

    def stored_name(self, name: str) -> str:
        """What the tensor is called where it lies, for messages."""
        return name

    def close(self) -> None:
        """Let go of open files."""
        if self.held is not None:
            self.held.release()


class CastSource(Source):
    """Another source in another dtype, cast tensor by tensor."""

    def __init__(self, source: Source, dtype: str) -> None:
        self.path, self.format, self.grid = source.path, source.format, source.grid
        self.companion_files, self.plan_path = source.companion_files, source.plan_path
        self.iteration, self.has_optimizer_state = source.iteration, source.has_optimizer_state
        self.lora = source.lora
        self.config = replace(source.config, dtype=dtype)
        self._source, self._dtype = source, DTYPES[dtype]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._source.read(name, start, stop).to(self._dtype)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype

    def close(self) -> None:
        self._source.close()


def assemble(name: str, pieces: Sequence[Piece], start: int, stop: int, where: object) -> Tensor:
    """Join the stored parts that hold ``[start, stop)``; one part is not copied.

    Raises:
        DamagedError: the parts do not cover the range.
    """
    parts, at = [], start
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start <= at < min(piece.stop, stop):
            upto = min(piece.stop, stop)
            parts.append(piece.load(at - piece.start, upto - piece.start))
            at = upto
    if at < stop or not parts:
        raise DamagedError(
            f"{where}: {name}: indices {at} to {stop} are in no shard; copy it again"
        )
    dim = split_dim(axes_of(name))
    return parts[0] if len(parts) == 1 or dim is None else torch.cat(parts, dim)
