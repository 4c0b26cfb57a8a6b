"""How clear a plan's decisions are: by how much the lowest kept unit beats the highest dropped one.

Layouts agree on scores within `ROUNDING` of their largest value. A decision with a smaller margin,
an exact tie among them, is one that another layout, machine or version of torch may take the other
way; the plan file settles it for all who read that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_prune.plan import PrunePlan
from megatron_prune.scores import AXIS_WORDS, Criterion

ROUNDING = 1e-5  # within which layouts agree, tests/engine/test_score_on_ranks.py
_NAMED = 4  # decisions that a message names


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The closest call of one block of units that were chosen among each other.

    Attributes:
        layer: None on an axis of the whole model.
        kept, dropped: the lowest-scored unit that stays, the highest-scored one that goes.
        margin: the difference of their scores as a share of the block's largest absolute score.
            What rounds is a sum over tokens, which errs in proportion to itself, so a block of
            small scores is held to its own size and not to the model's.
    """

    axis: str
    layer: int | None
    kept: int
    dropped: int
    margin: float

    def __str__(self) -> str:
        where = AXIS_WORDS[self.axis] + ("" if self.layer is None else f" of layer {self.layer}")
        return f"{where}: {self.kept} over {self.dropped}"


def decisions(plan: PrunePlan, criterion: Criterion, axes: str = "DQKFL") -> Iterator[Decision]:
    """One a block (of an axis, a layer, a balance rank, a kept group) that keeps some and drops
    some.

    Composites and ``perplexity-greedy`` score by ranks: there a margin tells of ties between the
    ranks only, and not of close calls in what was ranked.

    Args:
        criterion: what the plan was made from.
        axes: letters of those that were decided by it.
    """
    for axis in axes:
        for layer in plan.layers if axis in "QKF" else (None,):
            kept = plan.tensor(axis, layer)
            if kept is None:
                continue
            size = plan.source.size(axis)
            is_kept = torch.zeros(size, dtype=torch.bool)
            is_kept[kept] = True
            scores = criterion(axis, size, layer, plan.seed).double()
            for block in _blocks(plan, axis, layer):
                found = _closest(scores[block], is_kept[block])
                if found is not None:
                    low, high, margin = found
                    yield Decision(
                        axis=axis,
                        layer=layer,
                        kept=block.start + low,
                        dropped=block.start + high,
                        margin=margin,
                    )


def _blocks(plan: PrunePlan, axis: str, layer: int | None) -> list[slice]:
    """Units that `planning.make_plan` chooses among each other."""
    if axis == "Q":
        each = plan.source.heads_per_group
        return [slice(group * each, (group + 1) * each) for group in plan.indices("K", layer)]
    parts = plan.balance_for if axis in "KF" else 1
    each = plan.source.size(axis) // parts
    return [slice(part * each, (part + 1) * each) for part in range(parts)]


def _closest(scores: Tensor, is_kept: Tensor) -> tuple[int, int, float] | None:
    """Lowest kept, highest dropped and their margin; None where nothing was to choose."""
    if bool(is_kept.all()) or not bool(is_kept.any()):
        return None
    low = int(scores.masked_fill(~is_kept, torch.inf).argmin())
    high = int(scores.masked_fill(is_kept, -torch.inf).argmax())
    largest = float(scores.abs().max())
    return low, high, float(scores[low] - scores[high]) / largest if largest else 0.0


def rounding_text(found: Sequence[Decision]) -> str | None:
    """How many decisions are within rounding, on which axes, and the first of them; None when all
    are clear."""
    close = [decision for decision in found if decision.margin < ROUNDING]
    if not close:
        return None
    axes = Counter(AXIS_WORDS[decision.axis] for decision in close)
    names = [str(decision) for decision in close[:_NAMED]]
    if len(close) > _NAMED:
        names.append(f"and {len(close) - _NAMED} more")
    return (
        f"{len(close)} of {len(found)} decisions are within rounding (less than {ROUNDING:g} of "
        f"the largest score beside them), {', '.join(f'{n} on {axis}' for axis, n in axes.items())}"
        f"; another layout may take them the other way: {', '.join(names)}"
    )
