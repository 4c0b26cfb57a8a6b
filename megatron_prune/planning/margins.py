"""How clear a plan's decisions are: by how much the lowest kept unit beats the highest dropped one.

Layouts agree on each score within `ROUNDING` of itself (fp32). A decision with a smaller margin, an
exact tie among them, is one that another layout, machine or version of torch may take the other
way; the plan file settles it for all who read that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, SCORED_AXES
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import AXIS_WORDS, Terms, combined, is_plain

ROUNDING = 1e-5  # the largest difference seen between layouts is 1.4e-6 of the score itself
_NAMED = 4  # decisions that a message names


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The closest call of one block of units that were chosen among each other.

    Attributes:
        layer: None on an axis of the whole model.
        kept, dropped: the lowest-scored unit that stays, the highest-scored one that goes.
        is_close: whether it is within rounding.
    """

    axis: str
    layer: int | None
    kept: int
    dropped: int
    is_close: bool

    def __str__(self) -> str:
        where = AXIS_WORDS[self.axis] + ("" if self.layer is None else f" of layer {self.layer}")
        return f"{where}: {self.kept} over {self.dropped}"


def decisions(plan: PrunePlan, terms: Terms, axes: str = SCORED_AXES) -> Iterator[Decision]:
    """One a block (of an axis, a layer, a balance rank, a kept group) that keeps some and drops
    some.

    The margin is the difference of the two scores as a share of the larger of them: what rounds is
    a sum over tokens, which errs in proportion to itself. A share of the block's largest would call
    every decision of a wide axis with outliers close. Of a composite, which adds up ranks, a
    decision is close when ranks that are within rounding could turn it; ``perplexity-greedy`` holds
    nothing but ranks, of which one cannot tell.

    Args:
        terms: of what the plan was made from.
        axes: letters of those that were decided by it.
    """
    for axis in axes:
        for layer in plan.layers if AXES[axis].is_per_layer else (None,):
            kept = plan.tensor(axis, layer)
            if kept is None:
                continue
            size = plan.source.size(axis)
            is_kept = torch.zeros(size, dtype=torch.bool)
            is_kept[kept] = True
            found = terms(axis, size, layer)
            scores = combined(found).double()
            low, high = (scores, scores) if is_plain(found) else _bounds(found)
            for block in _blocks(plan, axis, layer):
                mine = is_kept[block]
                if bool(mine.all()) or not bool(mine.any()):
                    continue
                yield Decision(
                    axis=axis,
                    layer=layer,
                    kept=block.start + _lowest(scores[block], mine),
                    dropped=block.start + _highest(scores[block], ~mine),
                    is_close=_is_close(low[block], high[block], mine, single=is_plain(found)),
                )


def renumbered(decision: Decision, before: PrunePlan) -> Decision:
    """A decision about the model that ``before`` leaves, in the numbers of its source."""
    layer = None if decision.layer is None else before.layers[decision.layer]
    units = before.indices(decision.axis, layer)
    return replace(
        decision, layer=layer, kept=units[decision.kept], dropped=units[decision.dropped]
    )


def _blocks(plan: PrunePlan, axis: str, layer: int | None) -> list[slice]:
    """Units that `planning.make_plan` chooses among each other."""
    if axis == "Q":
        each = plan.source.heads_per_group
        return [slice(group * each, (group + 1) * each) for group in plan.indices("K", layer)]
    parts = plan.balance_for if axis in "KF" else 1
    each = plan.source.size(axis) // parts
    return [slice(part * each, (part + 1) * each) for part in range(parts)]


def _lowest(x: Tensor, among: Tensor) -> int:
    """The lowest of some units; of equal ones the last, which selection would drop first."""
    return len(x) - 1 - int(x.masked_fill(~among, torch.inf).flip(0).argmin())


def _highest(x: Tensor, among: Tensor) -> int:
    """The highest of some units; of equal ones the first."""
    return int(x.masked_fill(~among, -torch.inf).argmax())


def _is_close(low: Tensor, high: Tensor, is_kept: Tensor, *, single: bool) -> bool:
    kept, dropped = _lowest(low, is_kept), _highest(high, ~is_kept)
    least, most = float(low[kept]), float(high[dropped])
    if single:
        return least - most <= ROUNDING * max(abs(least), abs(most))
    return least < most or (least == most and dropped < kept)


def _bounds(terms: list[tuple[float, Tensor]]) -> tuple[Tensor, Tensor]:
    """[n] each: the least and the most that a composite can come to when every score may be off by
    half of `ROUNDING`."""
    low = high = torch.zeros(len(terms[0][1]), dtype=torch.float64)
    for weight, x in terms:
        ranks = torch.linspace(1, 0, len(x), dtype=torch.float64)  # as `scores.combined` has them
        half = ROUNDING / 2 * x.abs()
        less, more = x - half, x + half
        first = len(x) - torch.searchsorted(less.sort().values, more, right=True)
        last = len(x) - 1 - torch.searchsorted(more.sort().values, less)
        best, worst = weight * ranks[first], weight * ranks[last]
        low, high = low + torch.minimum(best, worst), high + torch.maximum(best, worst)
    return low, high


def rounding_text(found: Sequence[Decision]) -> str | None:
    """How many decisions are within rounding, on which axes, and the first of them; None when all
    are clear."""
    close = [decision for decision in found if decision.is_close]
    if not close:
        return None
    counts = Counter(AXIS_WORDS[decision.axis] for decision in close).items()
    axes = ", ".join(f"{count} on {axis}" for axis, count in counts)
    names = [str(decision) for decision in close[:_NAMED]]
    if len(close) > _NAMED:
        names.append(f"and {len(close) - _NAMED} more")
    return (
        f"{len(close)} of {len(found)} decisions are within rounding (scores less than "
        f"{ROUNDING:g} of themselves apart), {axes}; another layout may take them the other way: "
        f"{', '.join(names)}"
    )
