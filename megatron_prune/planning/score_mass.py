"""The cheap proxy of a shape search: how much of the scores' mass a shape would lose.

For an axis A and m kept units, with scores made non-negative (the lowest negative one becomes 0):

    kept_A(m) = mean over layers of (sum of the m scores that a plan keeps) / (sum of all)
    loss      = sum over A of  weight_A  ln kept_A(m_A) / ln kept_A(half)     A in L, D, Q, F

The loss is 0 for the source itself and grows without bound as an axis vanishes. The scores give the
curve along an axis, the weight its height: nats of loss when that axis alone is halved
(kept_A(half) is taken at the size nearest to half and brought to it by a power law). A plan keeps
the best units as `planning` does: as many on each of ``blocks`` tensor-parallel ranks, heads inside
their groups.

Why weights are needed: shares of scores are no losses, and differ with the criterion. On SmolLM2,
repaired, the excess loss along one axis was linear in ln kept within 5% (layers 28, 25, 21, by
activation), 12% (hidden 512, 448, 384, by residual-energy), 7% (heads 6, 3, by wanda) and 16% (FFN
1344, 1088, 832, by activation), but at 15, 45, 1.5 and 3.5 nats a unit. So `calibrated` takes the
weights from one evaluation an axis, where there is a text; `DEFAULT_WEIGHTS` are those of SmolLM2
(2025-11-22, 6 x 512 tokens of WikiText-2) and rank other models only roughly.

The limits: axes are taken one by one, as if what is lost in one changed nothing in another (in
truth they add up to more or less than their sum); layers that go still count in the means of Q and
F; the real loss of the best candidates (``--evaluate-data``) makes up for both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import PlanError
from megatron_prune.model.costs import Sizes
from megatron_prune.model.lazy import Tensor, np, torch
from megatron_prune.model.shape import AXES, SCORED_AXES, ModelShape
from megatron_prune.planning.scores import Criterion

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

PROXY_AXES = {axis: AXES[axis].word for axis in "LDQF"}
"""Axes of the proxy and the names of their weights. Groups go by their heads."""

DEFAULT_WEIGHTS: Mapping[str, float] = {"layers": 3.0, "hidden": 5.0, "heads": 0.8, "ffn": 1.7}
_LEAST_LOST = 1e-6  # -ln of a kept share; scores that are zero lose nothing
_LEAST_EXCESS = 1e-4  # nats; an axis that seems to cost nothing has still to cost something


@dataclass(frozen=True, kw_only=True)
class ScoreMass:
    """Kept shares by number of kept units; NaN where no plan keeps that many.

    Attributes:
        layers: [L + 1]. hidden: [D + 1]. ffn: [F + 1].
        heads: [K + 1, Q / K + 1], by kept groups and kept heads in each.
        weights: nats when an axis is halved. halves: -ln of the share kept then.
    """

    layers: Floats
    hidden: Floats
    heads: Floats
    ffn: Floats
    weights: Mapping[str, float]
    halves: Mapping[str, float]

    def kept_at(self, sizes: Sizes) -> dict[str, Any]:
        """Kept share of each axis in these sizes."""
        return {
            "layers": self.layers[sizes["L"]],
            "hidden": self.hidden[sizes["D"]],
            "heads": self.heads[sizes["K"], sizes["Q"] // sizes["K"]],
            "ffn": self.ffn[sizes["F"]],
        }

    def loss_at(self, sizes: Sizes) -> Any:
        """The proxy in these sizes, in nats: 0 or more."""
        return sum(
            np.abs(np.log(share)) * (self.weights[name] / self.halves[name])
            for name, share in self.kept_at(sizes).items()
        )

    def calibrated(self, probes: Mapping[str, tuple[Sizes, float]]) -> ScoreMass:
        """The same scores with weights from measurements.

        Args:
            probes: name of an axis -> sizes in which that axis alone is smaller, and by how many
                nats the loss of that model is above the source's.
        """
        weights = dict(self.weights)
        for name, (sizes, excess) in probes.items():
            lost = -float(np.log(self.kept_at(sizes)[name]))
            weights[name] = max(excess, _LEAST_EXCESS) * self.halves[name] / max(lost, _LEAST_LOST)
        return replace(self, weights=weights)


def measure_scores(
    shape: ModelShape,
    criterion: Criterion,
    *,
    seed: int,
    blocks: int = 1,
    weights: Mapping[str, float] = DEFAULT_WEIGHTS,
    whole: frozenset[str] = frozenset(),
) -> ScoreMass:
    """Tables of kept shares, from a criterion.

    Args:
        blocks: tensor-parallel ranks that each keep equally many of F and K; 1 for "unbalance".
        whole: axis letters that the criterion is not asked for, since nothing of them goes.

    Raises:
        PlanError: the criterion does not score an axis, or a weight is not 0 or more.
    """
    for name, weight in weights.items():
        if name not in PROXY_AXES.values() or not 0 <= weight < np.inf:
            raise PlanError(
                f"--proxy-weights {name}={weight:g}: wanted numbers of 0 or more for "
                f"{', '.join(PROXY_AXES.values())}"
            )

    def scores(axis: str) -> Tensor:
        """[n] or [L, n] float64, 0 or more, a sum of 1 over the units of a layer."""
        size = shape.size(axis)
        if axis in whole:
            return torch.full((1, size), 1 / size, dtype=torch.float64)
        layers = list(range(shape.num_layers)) if AXES[axis].is_per_layer else [None]
        return torch.stack(
            [_shares(criterion(axis, size, layer, seed).double()) for layer in layers]
        )

    order = None if "K" in whole else scores("K")
    tables = {
        "layers": _kept_of_each_block(scores("L"), 1),
        "hidden": _kept_of_each_block(scores("D"), 1),
        "ffn": _kept_of_each_block(scores("F"), blocks),
        "heads": _kept_in_groups(scores("Q"), order, shape, blocks),
    }
    halves = {name: _half(x) for name, x in tables.items() if name != "heads"}
    one_each = shape.heads_per_group == 1
    halves["heads"] = _half(tables["heads"][:, 1] if one_each else tables["heads"][-1])
    return ScoreMass(**tables, weights={**DEFAULT_WEIGHTS, **weights}, halves=halves)


def _half(kept: Floats) -> float:
    """-ln of the kept share of half an axis, from the size nearest to half, as kept ~ size^a."""
    size = len(kept) - 1
    sizes = np.flatnonzero(np.isfinite(kept[1:size])) + 1
    if not len(sizes):
        return 1.0  # an axis of one unit; nothing of it can go
    near = int(sizes[np.abs(np.log(sizes * 2 / size)).argmin()])
    return max(_LEAST_LOST, -float(np.log(kept[near])) * float(np.log(2) / np.log(size / near)))


def scored_axes(shape: ModelShape, criterion: Criterion, *, seed: int) -> frozenset[str]:
    """Which of L, D, Q, K and F a criterion scores, found by asking it."""
    found = set()
    for axis in SCORED_AXES:
        try:
            criterion(axis, shape.size(axis), 0 if AXES[axis].is_per_layer else None, seed)
        except PlanError:
            continue
        found.add(axis)
    return frozenset(found)


def _shares(scores: Tensor) -> Tensor:
    scores = scores - scores.min().clamp(max=0.0)
    total = scores.sum()
    return scores / total if total > 0 else torch.full_like(scores, 1 / len(scores))


def _by_count(kept: Tensor, size: int, blocks: int) -> Floats:
    """[blocks, size / blocks] shares in the order they are kept -> [size + 1] by how many are."""
    table = np.full(size + 1, np.nan)
    table[0] = 0.0
    table[blocks::blocks] = np.minimum(kept.cumsum(1).sum(0).numpy(), 1.0)
    table[size] = 1.0
    return table


def _kept_of_each_block(scores: Tensor, blocks: int) -> Floats:
    """[layers, size] shares -> [size + 1] mean kept share when each block keeps its best."""
    layers, size = scores.shape
    best = scores.view(layers, blocks, -1).sort(dim=2, descending=True).values
    return _by_count(best.mean(0), size, blocks)


def _kept_in_groups(heads: Tensor, groups: Tensor | None, shape: ModelShape, blocks: int) -> Floats:
    """[layers, Q] shares of heads and [layers, K] scores of groups -> [K + 1, Q / K + 1].

    Groups are kept by their own scores, as many in each block; in each the best heads.
    """
    number, per_group = shape.num_query_groups, shape.heads_per_group
    layers = len(heads)
    best = heads.view(layers, number, per_group).sort(dim=2, descending=True).values.cumsum(2)
    if groups is not None and len(groups) == layers:
        order = groups.view(layers, blocks, -1).sort(dim=2, descending=True, stable=True).indices
        first = torch.arange(blocks)[:, None] * (number // blocks)
        index = (order + first).view(layers, number, 1).expand_as(best)
        best = best.gather(1, index)
    mean = best.view(layers, blocks, number // blocks, per_group).mean(0)
    table = np.full((number + 1, per_group + 1), np.nan)
    for kept in range(per_group):
        table[:, kept + 1] = _by_count(mean[:, :, kept], number, blocks)
        table[number, kept + 1] = min(1.0, float(mean[:, :, kept].sum()))
    table[:, 0] = table[0] = 0.0
    table[number, per_group] = 1.0
    return table
