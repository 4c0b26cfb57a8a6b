"""Short runs of `shear` on pico models, and the masks that they leave."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_prune.engine.train.checkpoint import newest_checkpoint, training_state
from tests.engine.runs import SHORT

GQA_CUT = (
    *("--hidden-size-remain", 36, "--ffn-hidden-size-remain", 72),
    *("--num-attention-heads-remain", 3, "--num-layers-remain", 3),
)
RATES = ("--mask-lr", 0.05, "--lagrangian-lr", 0.5, "--sparsity-warmup-iters", 2)


def words(load: object, save: object, corpus: object, *more: object) -> list[str]:
    """``shear`` of a pico model; later flags win over the short run's own."""
    start = ["--load", str(load), "--save", str(save), "--data-path", str(corpus)]
    return ["shear", *start, *SHORT, *map(str, (*RATES, *more))]


def masks(save: Path) -> Mapping[str, Any]:
    """The masks of the newest checkpoint: parameters, lambdas, Adam of both."""
    newest = newest_checkpoint(save, mend=False)
    assert newest is not None
    state = training_state(newest)
    assert state is not None
    found: Mapping[str, Any] = state["masks"]
    return found
