"""Loss, perplexity and bits per byte of a text.

The text is tokenised once, without special tokens, and cut into non-overlapping windows; the last
partial one is dropped. The loss is the mean over windows of the mean over each window's targets, so
it is transformers' ``model(x, labels=x).loss`` averaged over windows. Bits per byte survives a
change of vocabulary: the nats of the scored tokens over the bytes these tokens decode to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a model makes of a text."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    windows: int

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def judge(window_losses: Sequence[float], targets_per_window: int, scored_bytes: int) -> Judgement:
    """The judgement from each window's mean loss.

    Args:
        window_losses: mean nats per target, one a window; at least one.
        targets_per_window: scored tokens in each window, its length less one.
        scored_bytes: UTF-8 bytes that the scored tokens of all windows decode to.
    """
    windows = len(window_losses)
    loss = math.fsum(window_losses) / windows
    tokens = windows * targets_per_window
    return Judgement(
        loss=loss,
        perplexity=math.exp(loss) if loss < 700 else math.inf,
        bits_per_byte=loss * tokens / math.log(2) / scored_bytes,
        tokens=tokens,
        windows=windows,
    )
