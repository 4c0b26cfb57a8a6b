"""Pruning in rounds: what is to remain after each, from the source's shape to the final one.

Iterative pruning scores, prunes a part, and scores what is left (Molchanov et al. 2017,
arXiv:1611.06440; tried for LLMs by Minitron, arXiv:2407.14679). Sizes go down linearly. They
depend on the model, the targets and the balance alone, never on the layout that scores, so that
every layout makes the same plan.
"""

from __future__ import annotations

import math
from dataclasses import replace

from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.choose import Targets, check_targets
from megatron_prune.planning.plan import PrunePlan


def round_targets(
    shape: ModelShape, targets: Targets, rounds: int, *, prune_type: str, balance_for: int
) -> tuple[Targets, ...]:
    """What is to remain after each of ``rounds``; the last one is ``targets`` exactly.

    Between the ends, FFN channels and query groups stay multiples of ``balance_for`` (where both
    ends are, which balance insists on), and every group keeps equally many heads. Layers that are
    named go in the order in which they stand. All layers are numbered as in the source.

    Raises:
        PlanError: a target that the model, or the balance, does not allow.
    """
    final = check_targets(shape, targets, balance_for if prune_type == "balance" else 1)

    def after(number: int) -> Targets:
        def size(source: int, last: int | None, multiple: int = 1) -> int | None:
            return None if last is None else _between(source, last, number, rounds, multiple)

        groups = size(shape.num_query_groups, final.num_query_groups, balance_for)
        heads = None
        if final.num_attention_heads is not None:
            per_group = final.num_attention_heads // (
                final.num_query_groups or shape.num_query_groups
            )
            each = _between(shape.heads_per_group, per_group, number, rounds)
            heads = each * (groups or shape.num_query_groups)
        dropped = len(final.drop_layers) - _between(len(final.drop_layers), 0, number, rounds)
        return Targets(
            hidden_size=size(shape.hidden_size, final.hidden_size),
            ffn_hidden_size=size(shape.ffn_hidden_size, final.ffn_hidden_size, balance_for),
            num_attention_heads=heads,
            num_query_groups=groups,
            num_layers=size(shape.num_layers, final.num_layers),
            drop_layers=final.drop_layers[:dropped],
        )

    return tuple(after(number) for number in range(1, rounds + 1))


def _between(source: int, final: int, number: int, rounds: int, multiple: int = 1) -> int:
    """The size after round ``number``: nearest to the line, upwards when two are, in steps of
    ``multiple`` or, where an end is none, of what it shares with both ends."""
    step = math.gcd(source, final, multiple)
    steps = (source - final) // step
    left = (2 * steps * (rounds - number) + rounds) // (2 * rounds)
    return final + left * step


def remaining_shape(shape: ModelShape, targets: Targets) -> ModelShape:
    """The shape that checked targets leave of a model."""
    return replace(
        shape,
        num_layers=targets.num_layers or shape.num_layers - len(targets.drop_layers),
        hidden_size=targets.hidden_size or shape.hidden_size,
        ffn_hidden_size=targets.ffn_hidden_size or shape.ffn_hidden_size,
        num_attention_heads=targets.num_attention_heads or shape.num_attention_heads,
        num_query_groups=targets.num_query_groups or shape.num_query_groups,
    )


def targets_after(plan: PrunePlan, targets: Targets) -> Targets:
    """Targets of the source, said to the model that ``plan`` leaves of it: named layers that are
    still there, by their number there."""
    here = tuple(plan.layers.index(n) for n in targets.drop_layers if n in plan.layers)
    return replace(targets, drop_layers=here)
