"""What a plan keeps, and what every criterion would keep in its place: masks and their overlap.

Selection is the planner's own (`planning.keep_top`, `planning.keep_in_groups`), at the plan's
counts, balance and kept groups, so a plan made from a criterion agrees with it to the unit.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_prune.errors import PlanError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, LAYER_AXES
from megatron_prune.planning.choose import keep_in_groups, keep_top
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Scores

AXIS_NAMES = {axis: f"{AXES[axis].unit}s" for axis in "QKFDL"}  # in the order of the page
UNITS = {axis: AXES[axis].unit.split()[-1] for axis in AXIS_NAMES}


def kept_mask(plan: PrunePlan, axis: str) -> Tensor:
    """Bool [L, n] of an axis chosen layer by layer (False in dropped layers), [n] of D and L."""
    shape = plan.source
    if axis not in LAYER_AXES:
        mask = torch.zeros(shape.size(axis), dtype=torch.bool)
        mask[list(plan.indices(axis))] = True
        return mask
    mask = torch.zeros(shape.num_layers, shape.size(axis), dtype=torch.bool)
    for layer in plan.layers:
        mask[layer, list(plan.indices(axis, layer))] = True
    return mask


def axis_scores(scores: Scores, expression: str, axis: str) -> Tensor | None:
    """[L, n] or [n] float64: what planning by this criterion, or composite, goes by along an axis.

    None where the scores do not hold it. Groups without a score of their own get that of their
    heads together, as planning does.
    """
    size, layers = scores.shape.size(axis), range(scores.shape.num_layers)
    try:
        of = scores.criterion(expression)
        if axis not in LAYER_AXES:
            return of(axis, size, None, 0)
        return torch.stack([of(axis, size, layer, 0) for layer in layers])
    except PlanError:
        return None


def criteria_of(scores: Scores | None, axis: str, expression: str = "") -> dict[str, Tensor]:
    """Every criterion that scores the axis, by name; first what ``expression`` comes to.

    That goes by the name of the criterion it is along this axis, or by its part for the axis
    (``activation+wanda`` of ``hidden=wanda,ffn=activation+wanda``).
    """
    if scores is None:
        return {}
    each = {name: axis_scores(scores, name, axis) for name in sorted(scores.criteria)}
    found = {name: x for name, x in each.items() if x is not None}
    own = axis_scores(scores, expression, axis) if expression else None
    if own is None:
        return found
    parts = [part.rpartition("=")[2].strip() for part in expression.split(",")]
    known = {**found, **{part: axis_scores(scores, part, axis) for part in parts}}
    same = (name for name, x in known.items() if x is not None and torch.equal(x, own))
    return {next(same, expression): own, **found}  # a dict keeps the place of what stands first


def dropped_layers(plan: PrunePlan) -> tuple[int, ...]:
    """Source numbers of the layers a plan leaves out."""
    return tuple(sorted(set(range(plan.source.num_layers)) - set(plan.layers)))


def is_pruned(plan: PrunePlan, axis: str) -> bool:
    """Whether the plan drops anything along the axis (inside the layers that it keeps)."""
    layers = plan.layers if axis in LAYER_AXES else (None,)
    return any(len(plan.indices(axis, n)) < plan.source.size(axis) for n in layers)


def chosen_mask(plan: PrunePlan, axis: str, scores: Tensor) -> Tensor:
    """What these scores would keep where the plan decides: as `kept_mask`, with equal counts."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if axis not in LAYER_AXES:
        mask[list(keep_top(scores, len(plan.indices(axis))))] = True
        return mask
    for layer in plan.layers:
        keep = len(plan.indices(axis, layer))
        if axis == "Q":
            groups = plan.indices("K", layer)
            each = plan.source.heads_per_group
            kept = keep_in_groups(scores[layer], groups, keep // len(groups), each)
        else:
            kept = keep_top(scores[layer], keep, _blocks(plan, axis, keep))
        mask[layer, list(kept)] = True
    return mask


def _blocks(plan: PrunePlan, axis: str, keep: int) -> int:
    """Equal parts the planner chose in; one where a plan edited by hand keeps to no such parts."""
    ranks = plan.balance_for
    return 1 if plan.source.size(axis) % ranks or keep % ranks else ranks


def overlap(masks: Mapping[str, Tensor]) -> Tensor:
    """[n, n] float64: the share of the units one mask keeps that the other keeps too."""
    rows = torch.stack([mask.flatten() for mask in masks.values()]).double()
    return (rows @ rows.T) / rows.sum(1, keepdim=True)


def overlap_masks(plan: PrunePlan, axis: str, criteria: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The plan's own mask, under ``the plan``, and that of every criterion."""
    chosen = {name: chosen_mask(plan, axis, x) for name, x in criteria.items()}
    return {"the plan": kept_mask(plan, axis), **chosen}


def chance(plan: PrunePlan, axis: str) -> float:
    """The overlap that two random decisions with the plan's counts have on average."""
    if axis not in LAYER_AXES:
        return len(plan.indices(axis)) / plan.source.size(axis)
    counts = [len(plan.indices(axis, n)) for n in plan.layers]
    if axis == "Q":  # heads are drawn among those of the kept groups
        sizes = [len(plan.indices("K", n)) * plan.source.heads_per_group for n in plan.layers]
    else:
        sizes = [plan.source.size(axis)] * len(counts)
    return sum(k * k / size for k, size in zip(counts, sizes)) / sum(counts)
