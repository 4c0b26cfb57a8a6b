"""Scores -> plan: check what is asked for, then keep the best-scored units.

"balance" keeps equally many of every split axis on each of ``balance_for`` tensor-parallel ranks,
so each shard gets the same shape and no weight crosses ranks; it is then balanced for every divisor
too. "unbalance" keeps the best wherever they are. Heads are always chosen inside their kept groups,
equally many in each; the hidden axis is replicated and drawn once for the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_prune.errors import PlanError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.allocation import Nonuniform, spread
from megatron_prune.planning.plan import Kept, PrunePlan
from megatron_prune.planning.scores import Criterion

_LAYERS = re.compile(r"([0-9]{1,6})(?:-([0-9]{1,6}))?")  # no model has a million layers


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What is to remain; None keeps an axis whole."""

    hidden_size: int | None = None
    ffn_hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_query_groups: int | None = None
    num_layers: int | None = None
    drop_layers: tuple[int, ...] = ()


def parse_layers(text: str, flag: str = "--drop-layers") -> tuple[int, ...]:
    """``7,13,18-20`` -> (7, 13, 18, 19, 20).

    Raises:
        PlanError: not numbers and ranges, or none at all.
    """
    layers: list[int] = []
    for word in (part.strip() for part in text.split(",")):
        match = _LAYERS.fullmatch(word)
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first:
            raise PlanError(
                f"{flag} {text}: {word!r} is not a layer; wanted numbers and ranges such "
                "as 7,13,18-20"
            )
        layers += range(first, last + 1)
    return tuple(layers)


def make_plan(
    shape: ModelShape,
    targets: Targets,
    criterion: Criterion,
    *,
    criterion_name: str,
    seed: int,
    prune_type: str,
    balance_for: int,
    source_digest: str,
    nonuniform: Nonuniform | None = None,
) -> PrunePlan:
    """Decide what is kept.

    Args:
        nonuniform: how layers share the FFN channels that ``targets`` keeps of each on average;
            None keeps equally many in every layer.

    Raises:
        PlanError: a target that this model, or this balance, does not allow; says which are near.
    """
    ranks = balance_for if prune_type == "balance" else 1
    targets = check_targets(shape, targets, ranks)
    if targets.num_layers is not None:
        kept_layers = keep_top(criterion("L", shape.num_layers, None, seed), targets.num_layers)
        dropped = set(range(shape.num_layers)) - set(kept_layers)
    else:
        dropped = set(targets.drop_layers)
    layers = tuple(layer for layer in range(shape.num_layers) if layer not in dropped)

    def best(axis: str, keep: int, layer: int | None, blocks: int) -> tuple[int, ...]:
        return keep_top(criterion(axis, shape.size(axis), layer, seed), keep, blocks)

    groups = heads = ffn = hidden = None
    if targets.num_query_groups is not None:
        groups = {n: best("K", targets.num_query_groups, n, ranks) for n in layers}
    if targets.num_attention_heads is not None:
        per_group = targets.num_attention_heads // (
            targets.num_query_groups or shape.num_query_groups
        )
        heads = {}
        for n in layers:
            scores = criterion("Q", shape.num_attention_heads, n, seed)
            among = range(shape.num_query_groups) if groups is None else groups[n]
            heads[n] = keep_in_groups(scores, among, per_group, shape.heads_per_group)
    if targets.ffn_hidden_size is not None:
        widths = dict.fromkeys(layers, targets.ffn_hidden_size)
        if nonuniform is not None:
            of = [criterion("F", shape.ffn_hidden_size, n, seed) for n in layers]
            counts = spread(torch.stack(of), targets.ffn_hidden_size, ranks, nonuniform)
            widths = dict(zip(layers, counts))
        ffn = {n: best("F", widths[n], n, ranks) for n in layers}
    if targets.hidden_size is not None:
        hidden = best("D", targets.hidden_size, None, 1)
    return PrunePlan(
        source=shape,
        kept=Kept(
            layers=layers if dropped else None,
            hidden=hidden,
            heads=heads,
            query_groups=groups,
            ffn=ffn,
        ),
        criterion=criterion_name,
        seed=seed,
        prune_type=prune_type,
        balance_for=ranks,
        source_digest=source_digest,
        uniform=ffn is None or len({len(kept) for kept in ffn.values()}) == 1,
    )


def check_targets(shape: ModelShape, targets: Targets, ranks: int) -> Targets:
    """The targets with what follows from them filled in; axes kept whole become None.

    Raises:
        PlanError: see `make_plan`; ``ranks`` are those to balance for, 1 for none.
    """
    _check_layers(shape, targets.drop_layers)
    if targets.num_layers is not None and targets.drop_layers:
        raise PlanError("--num-layers-remain and --drop-layers: give one of the two")
    for flag, found, size in (
        ("num-layers-remain", targets.num_layers, shape.num_layers),
        ("hidden-size-remain", targets.hidden_size, shape.hidden_size),
        ("ffn-hidden-size-remain", targets.ffn_hidden_size, shape.ffn_hidden_size),
        ("num-attention-heads-remain", targets.num_attention_heads, shape.num_attention_heads),
        ("num-query-groups-remain", targets.num_query_groups, shape.num_query_groups),
    ):
        if found is not None and not 1 <= found <= size:
            raise PlanError(f"--{flag} {found}: the model has {size}; wanted 1 to {size}")
    heads, groups = _attention_targets(shape, targets)
    over = None if heads is None else groups or shape.num_query_groups
    if ranks < 1:
        raise PlanError(f"--balance-for {ranks}: wanted 1 or more")
    for axis, found, size in (
        ("ffn-hidden-size-remain", targets.ffn_hidden_size, shape.ffn_hidden_size),
        # a head goes where its group is, so heads are balanced only over groups that are
        ("num-query-groups-remain", over, shape.num_query_groups),
        ("num-attention-heads-remain", heads, shape.num_attention_heads),
    ):
        if found is not None:
            _check_balance(axis, found, size, ranks)

    def changed(found: int | None, size: int) -> int | None:
        return None if found == size else found

    return Targets(
        hidden_size=changed(targets.hidden_size, shape.hidden_size),
        ffn_hidden_size=changed(targets.ffn_hidden_size, shape.ffn_hidden_size),
        num_attention_heads=changed(heads, shape.num_attention_heads),
        num_query_groups=changed(groups, shape.num_query_groups),
        num_layers=changed(targets.num_layers, shape.num_layers),
        drop_layers=targets.drop_layers,
    )


def keep_top(scores: Tensor, keep: int, blocks: int = 1) -> tuple[int, ...]:
    """The best ``keep / blocks`` of each of ``blocks`` equal parts of an axis, sorted.

    Args:
        scores: [n] any float dtype; equal scores prefer the lower index.
    """
    rows = scores.view(blocks, -1)
    order = torch.sort(rows, dim=1, descending=True, stable=True).indices[:, : keep // blocks]
    first = torch.arange(blocks)[:, None] * rows.shape[1]
    return tuple(sorted((order + first).flatten().tolist()))


def keep_in_groups(
    scores: Tensor, groups: Iterable[int], per_group: int, heads_per_group: int
) -> tuple[int, ...]:
    """The best ``per_group`` heads of each kept group, sorted. ``scores`` is [heads]."""
    kept: list[int] = []
    for group in groups:
        first = group * heads_per_group
        mine = scores[first : first + heads_per_group]
        kept += [first + head for head in keep_top(mine, per_group)]
    return tuple(sorted(kept))


def _attention_targets(shape: ModelShape, targets: Targets) -> tuple[int | None, int | None]:
    """Heads and groups to keep. In a model with one head per group either one says both."""
    heads, groups, per_group = (
        targets.num_attention_heads,
        targets.num_query_groups,
        shape.heads_per_group,
    )
    if groups is None and heads is not None and per_group == 1:
        groups = heads
    if heads is None and groups is not None:
        heads = groups * per_group
    if heads is None:
        return None, None
    over = groups or shape.num_query_groups
    if heads % over or heads // over > per_group:
        legal = [over * n for n in range(1, per_group + 1)]
        raise PlanError(
            f"--num-attention-heads-remain {heads} over {over} query groups of up to {per_group} "
            f"heads: keep equally many in every group ({', '.join(map(str, legal))})"
        )
    return heads, groups


def _check_balance(flag: str, keep: int, size: int, ranks: int) -> None:
    if size % ranks:
        raise PlanError(
            f"--balance-for {ranks} does not divide the model's {size} "
            f"({flag.removesuffix('-remain')}); choose a tensor-parallel size that does"
        )
    if keep % ranks:
        near = [n for n in (keep // ranks * ranks, -(-keep // ranks) * ranks) if 0 < n <= size]
        raise PlanError(
            f"--{flag} {keep} over {ranks} tensor-parallel ranks: every rank keeps equally many; "
            f"nearest: {' or '.join(map(str, near))} (or --prune-type unbalance)"
        )


def _check_layers(shape: ModelShape, dropped: tuple[int, ...]) -> None:
    last = shape.num_layers - 1
    for layer in dropped:
        if layer > last:
            raise PlanError(f"--drop-layers: {layer} is not a layer; the model has 0 to {last}")
        if dropped.count(layer) > 1:
            raise PlanError(f"--drop-layers: {layer} stands twice; name each layer once")
    if len(dropped) > last:
        raise PlanError(f"--drop-layers: drops all {shape.num_layers} layers; keep at least one")
