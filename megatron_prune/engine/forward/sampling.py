"""Which token comes next: the largest logit, or one drawn as transformers draws it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_prune.errors import ConfigError
from megatron_prune.flags import flag
from megatron_prune.model.lazy import Tensor, torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy, whatever the other fields say."""

    temperature: float = flag("of the drawing; 0 is greedy", default=0.0, metavar="T")
    top_k: int = flag("draw among the K likeliest; 0: all", default=0, metavar="K")
    top_p: float = flag(
        "draw among the likeliest that together have probability P; 1: all",
        default=1.0,
        metavar="P",
    )
    seed: int = flag("of the drawing", default=1234)

    def check(self) -> None:
        """Raises:
        ConfigError: a value outside its range.
        """
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"--temperature {self.temperature}; wanted 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"--top-k {self.top_k}; wanted 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}; wanted above 0, up to 1 (all)")
        if self.temperature == 0 and (self.top_k or self.top_p < 1):
            raise ConfigError(
                "--top-k and --top-p choose among drawn tokens, and at --temperature 0 none is "
                "drawn; give a --temperature above 0, or leave them out"
            )


def filtered_logits(logits_bV: Tensor, sampling: Sampling) -> Tensor:
    """[b, V] over the temperature, -inf where a token may not be drawn.

    In the order of transformers' warpers: temperature, top-k, top-p (Holtzman et al. 2019,
    arXiv:1904.09751); the likeliest token always stays.
    """
    scores = logits_bV.float() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        rising, order = scores.sort(descending=False)
        below = rising.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below[:, -1] = False
        scores = scores.masked_fill(below.scatter(1, order, below), -torch.inf)
    return scores


def choose(logits_bV: Tensor, sampling: Sampling, generator: torch.Generator) -> list[int]:
    """The next token of each row; the same on every rank that has the same logits.

    Args:
        generator: of the CPU, so that a seed means the same on every device.
    """
    if sampling.temperature == 0:
        return [int(token) for token in logits_bV.argmax(-1)]
    shares = filtered_logits(logits_bV.cpu(), sampling).softmax(-1)
    return [int(token) for token in torch.multinomial(shares, 1, generator=generator)[:, 0]]
