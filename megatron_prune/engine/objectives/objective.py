"""What a training run minimises, as the loop sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor

from megatron_prune.engine.forward.microbatches import Microbatch, Step, lm_loss
from megatron_prune.engine.forward.model import LanguageModel

LM_LOSS = "lm loss"  # every objective tells it


class Objective(Protocol):
    """A guest of the training loop; its methods are called on all ranks alike, but `loss`.

    Attributes:
        learns: what it learns itself, as messages call it.
        names: of the values that are logged beside `LM_LOSS`; a step in which one of them is not a
            number is not taken.
        freezes: whether the weights of the model stay as they are.
    """

    learns: str
    names: tuple[str, ...]
    freezes: bool

    def attach(self, model: LanguageModel) -> None:
        """Hang on the model what it takes, before its gradients get their buffers."""
        ...

    def beside(self, batches: Iterator[Microbatch], step: Step) -> Iterator[Microbatch]:
        """The microbatches of a step, with whatever has to be known before the model sees one."""
        ...

    def loss(self, losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised, and `LM_LOSS` and ``names`` by name, of the microbatch just seen.

        All are this context-parallel rank's share: sums over its tokens, divided by
        ``batch.counted``. Called on the last stage.
        """
        ...

    def ready(self, scale: float) -> float:
        """Make the gradients of what it learns itself whole; called when the model's are.

        Args:
            scale: fp16's of the loss, and so of the gradients.

        Returns:
            Their norm, where they are to be clipped together with the model's, else 0; not finite:
            the step is wrong.
        """
        ...

    def step(self, share: float, norm: float) -> None:
        """Step what it learns itself; called when the model's weights have been stepped.

        Args:
            share: of the peak learning rate that this step was taken with.
            norm: of all gradients that are clipped together.
        """
        ...

    def told(self) -> dict[str, Any]:
        """What a logged iteration says of it, beside losses; JSON values."""
        ...

    def state(self) -> dict[str, Any]:
        """Its keys in the checkpoint; plain types and tensors only."""
        ...


class LanguageModelLoss:
    """The mean loss of the next token; nothing else, and nothing that is learned beside."""

    learns = ""
    names: tuple[str, ...] = ()
    freezes = False

    def attach(self, model: LanguageModel) -> None:
        pass

    def beside(self, batches: Iterator[Microbatch], step: Step) -> Iterator[Microbatch]:
        return batches

    def loss(self, losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return lm_loss(losses_bs, batch)

    def ready(self, scale: float) -> float:
        return 0.0

    def step(self, share: float, norm: float) -> None:
        pass

    def told(self) -> dict[str, Any]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}
