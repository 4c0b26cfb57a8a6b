"""How many FFN channels each layer keeps when layers may differ: the best ones of the whole model.

This file decides counts alone; which channels of a layer are kept follows from its count as in any
plan (`planning`). Attention stays equal in all layers: what loads layers of different widths
(`store.block_configs`) has one number of heads for the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_prune.errors import PlanError
from megatron_prune.model.lazy import Tensor, torch

COMPARISONS = ("log", "standardized", "raw")
_LEAST = 1e-6  # of a layer's largest score: what is below counts as that, zeros and dead channels


@dataclass(frozen=True, kw_only=True)
class Nonuniform:
    """Rules for layers that keep different numbers of FFN channels.

    Attributes:
        floor: the least a layer keeps, as a share of the average.
        multiple: every layer's count is a multiple of it.
        scores: one of COMPARISONS, see `comparable`.
    """

    floor: float = 0.25
    multiple: int = 1
    scores: str = COMPARISONS[0]


def comparable(scores_LF: Tensor, how: str) -> Tensor:
    """Scores of different layers, made to compare with each other. [L, F] float64.

    Most criteria grow with the size of the activations, and that grows with depth whatever a
    channel is worth: as they are, the last layers would take nearly all.

    ``standardized``: less the layer's mean, divided by its standard deviation: FLAP's standardized
    metric (An et al. 2023, arXiv:2312.11983). What remains is how far channels stand out from their
    layer's average. A few outliers widen the deviation until all others look average, and so better
    than the lower half of a layer without outliers, which then pays for them. ``log``: the same of
    the logarithms, which outliers hardly move; what remains are ratios to the layer's geometric
    mean. docs/nonuniform.md has what each came to. ``raw``: as they are, for criteria whose layers
    compare already (a change of the loss: taylor, fisher).

    A layer whose scores are all equal has zeros. Composites are ranks inside a layer: every layer
    then looks alike and keeps nearly equally many.
    """
    x = scores_LF.double()
    if how == "raw":
        return x
    if how == "log":
        least = (x.amax(1, keepdim=True) * _LEAST).clamp(min=torch.finfo(x.dtype).tiny)
        x = torch.maximum(x, least).log()
    x = x - x.mean(1, keepdim=True)
    deviation = x.square().mean(1, keepdim=True).sqrt()
    return torch.where(deviation > 0, x / deviation, 0.0)


def spread(scores_LF: Tensor, average: int, ranks: int, rules: Nonuniform) -> list[int]:
    """Counts of L layers that add up to ``average`` L and keep the highest sum of scores.

    Every count is a multiple of ``rules.multiple`` and of ``ranks``; each rank's part of a layer
    keeps equally many. A layer's n-th step (the next best channels of each part) gains no more than
    the one before, so taking the best steps of all layers, floors first, is the optimum. Equal
    steps prefer the earlier layer.

    Args:
        scores_LF: one row a kept layer.
        ranks: equal parts of the channels; divides F.

    Raises:
        PlanError: the sizes do not work out; says what does.
    """
    (layers, size), step = scores_LF.shape, math.lcm(rules.multiple, ranks)
    least = max(1, math.ceil(rules.floor * average / step)) * step
    most = size // step * step
    total = average * layers
    _check(average, layers, step, least=least, most=most)
    parts = comparable(scores_LF, rules.scores).reshape(layers, ranks, -1)
    best = torch.sort(parts, dim=2, descending=True).values[..., : most // ranks]
    gains = best.reshape(layers, ranks, most // step, step // ranks).sum((1, 3))
    rest = gains[:, least // step :]
    order = torch.sort(rest.flatten(), descending=True, stable=True).indices
    taken = order[: (total - least * layers) // step] // max(1, rest.shape[1])
    more = torch.bincount(taken, minlength=layers)
    return [least + step * int(n) for n in more]


def _check(average: int, layers: int, step: int, *, least: int, most: int) -> None:
    flag = f"--ffn-hidden-size-remain {average} --nonuniform"
    if average > most:
        less = "no more, or for " if most else ""
        raise PlanError(
            f"{flag}: a layer keeps at most {most}, in multiples of {step} (--nonuniform-multiple "
            f"and --balance-for); ask for {less}a smaller multiple"
        )
    if average * layers % step:
        # multiples of this keep the sum over all layers a multiple of the step
        each = step // math.gcd(step, layers)
        near = [n for n in (average // each * each, -(-average // each) * each) if 0 < n <= most]
        raise PlanError(
            f"{flag}: {average * layers} channels over {layers} layers are no multiple of {step} "
            f"(--nonuniform-multiple and --balance-for); nearest: {' or '.join(map(str, near))}"
        )
    if least > average:
        raise PlanError(
            f"{flag}: --nonuniform-floor makes a layer keep at least {least} in multiples of "
            f"{step}; ask for a lower floor, a smaller multiple or more channels"
        )
