"""A source: any model whose tensors can be read one at a time, by canonical name.

Every store opens as one; a pruned model (`pruned.PrunedSource`) is one too, so converting,
pruning, resharding and checking are the same loop over different sources. `read` gives a view of a
memory map where it can; nothing is held between two reads.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import axes_of, names, split_dim, split_layer
from megatron_prune.model.blocks import EMBEDDING
from megatron_prune.model.fusion import Piece
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.lora import Lora
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import torch_dtype

REPAIR = "repair.json"  # beside the plan
FOLDING = "folding.json"  # of gates in its weights: beside the plan
CARD = "README.md"  # the model card
VOCAB_PLAN = "vocab_plan.json"  # of a model whose tokenizer was pruned: travels with its files
SPARSITY = "sparsity.json"  # of a model with zeros set in it: travels with its files
COMMANDS = "commands.jsonl"  # of a training run: beside its checkpoints; then it travels with them
_SAMPLE = 64  # values that the digest takes at each of two places of a split tensor


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
        return self._beside_the_plan(REPAIR)

    @property
    def folding_path(self) -> Path | None:
        """The record of the gates folded into it, which lies beside its plan; None when there is
        none."""
        return self._beside_the_plan(FOLDING)

    def _beside_the_plan(self, name: str) -> Path | None:
        path = None if self.plan_path is None else self.plan_path.with_name(name)
        return path if path is not None and path.is_file() else None

    @property
    def sparsity_path(self) -> Path | None:
        """The record of the zeros that were set in it; None when there is none."""
        return self.companion_files.get(SPARSITY)

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
    def first_dtype(self) -> torch.dtype:
        """What the weights are where nothing says it: the embedding's dtype; of a Hugging Face
        directory that of the first tensor, which transformers takes."""
        return self.dtype(EMBEDDING.name)

    @property
    def stored_vocab_size(self) -> int:
        """Rows of the embedding where it lies, padding included."""
        return self.config.shape.vocab_size

    def stored_name(self, name: str) -> str:
        """What the tensor is called where it lies, for messages."""
        return name

    def origin(self, name: str) -> tuple[Source, str]:
        """The source that has the files, and its canonical name for the tensor."""
        return self, name

    def close(self) -> None:
        """Let go of open files."""
        if self.held is not None:
            self.held.release()

    @cached_property
    def digest(self) -> str:
        """A fingerprint that tells two models of one shape apart, whatever they are stored in.

        SHA-256 over the shape and samples of every tensor, as float32. Norms and replicated biases
        count whole; of a tensor that tensor parallelism splits, the first values at its first and
        its middle index. That is a few kB per layer of any model, so it costs page faults, not a
        read of the checkpoint, and it does not depend on format, layout, padding or fusing. Two
        models that agree in all of these places have the same digest. It is computed once.
        """
        shape = self.config.shape
        hashed = hashlib.sha256(json.dumps(shape.as_dict()).encode())
        for name in names(self.config):
            axes = axes_of(name)
            dim = split_dim(axes)
            middle = 0 if dim is None else shape.size(axes[dim], split_layer(name)[0]) // 2
            for at in sorted({0, middle}):
                x = self.read(name) if dim is None else self.read(name, at, at + 1)
                sample = x if dim is None else x[:1].reshape(-1)[:_SAMPLE]
                hashed.update(sample.to(torch.float32).contiguous().numpy().tobytes())
        return hashed.hexdigest()


class DerivedSource(Source):
    """A model that is made of another one as it is read.

    It says whatever the other one says; a subclass sets or overrides what it changes. The other one
    stays the one that holds the files: closing this closes it.
    """

    def __init__(self, source: Source) -> None:
        self.path, self.format = source.path, source.format
        self.config, self.grid = source.config, source.grid
        self.companion_files, self.plan_path = source.companion_files, source.plan_path
        self.iteration, self.has_optimizer_state = source.iteration, source.has_optimizer_state
        self.lora = source.lora
        self._source = source

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._source.read(name, start, stop)

    def dtype(self, name: str) -> torch.dtype:
        return self._source.dtype(name)

    @property
    def stored_vocab_size(self) -> int:
        return self._source.stored_vocab_size

    def stored_name(self, name: str) -> str:
        origin, name = self.origin(name)
        return origin.stored_name(name)

    def origin(self, name: str) -> tuple[Source, str]:
        return self._source.origin(name)

    def close(self) -> None:
        self._source.close()

    def _forget_history(self) -> None:
        """For other weights than those that were planned, repaired, folded, adapted, trained or
        counted."""
        self.plan_path, self.lora, self.has_optimizer_state = None, None, False
        self.companion_files = {k: v for k, v in self.companion_files.items() if k != SPARSITY}


class CastSource(DerivedSource):
    """Another source in another dtype, cast tensor by tensor."""

    def __init__(self, source: Source, dtype: str) -> None:
        super().__init__(source)
        self.config = replace(source.config, dtype=dtype)
        self._dtype = torch_dtype(dtype)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._source.read(name, start, stop).to(self._dtype)

    def dtype(self, name: str) -> torch.dtype:
        return self._dtype


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
