"""Which units have gates, and how the gates of a model lie in one vector.

Hidden channels have one gate each for the whole model, heads, query groups and FFN channels one in
every layer, and every layer one for both of its halves. All gates of a model are one float32
vector; an axis is a block of it, [rows, size]: a row a layer, or one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, ModelShape

MASK_UNITS = ("heads", "groups", "both")
_ATTENTION = {"heads": "Q", "groups": "K", "both": "QK"}


@dataclass(frozen=True, kw_only=True)
class Gated:
    """An axis whose units have gates.

    Attributes:
        letter: of `AXES`.
        rows, size: the gates are [rows, size].
        keep: units of a row that are to stay; None where only the size of the whole model is given.
            Of heads it counts those of query groups that go, too: a group's gate is its own.
        parts: equal parts of a row in each of which a plan keeps equally many.
    """

    letter: str
    rows: int
    size: int
    keep: int | None
    parts: int = 1

    @property
    def word(self) -> str:
        """What metrics and plans call it."""
        return AXES[self.letter].word

    @property
    def target(self) -> float:
        """The share of its units that are to go."""
        return 0.0 if self.keep is None else 1 - self.keep / self.size


def gated_axes(
    shape: ModelShape, target: ModelShape | None, units: str | None = None, ranks: int = 1
) -> tuple[Gated, ...]:
    """The axes with gates on the way from one shape to another.

    Args:
        target: None where the shape is free: all axes have gates then.
        units: one of `MASK_UNITS`, what attention is gated by; None: what the target needs, and
            whole groups where it is free.
        ranks: on each of which the plan keeps equally many.

    Raises:
        ConfigError: the target cannot be reached with these units, or nothing is to go.
    """
    keep = {letter: None if target is None else target.size(letter) for letter in "DQKFL"}
    if target is not None:
        # of heads those in all groups: whole groups go by the gates of groups
        keep["Q"] = target.heads_per_group * shape.num_query_groups
    less = [letter for letter in "DQKFL" if keep[letter] != shape.size(letter)]
    needed = {letter for letter in less if letter in "QK"}
    if target is not None and units is not None and not needed <= set(_ATTENTION[units]):
        wanted = next(word for word, letters in _ATTENTION.items() if set(letters) == needed)
        raise ConfigError(
            f"--mask-units {units}: the target keeps {target.num_attention_heads} of "
            f"{shape.num_attention_heads} heads in {target.num_query_groups} of "
            f"{shape.num_query_groups} query groups; wanted {wanted}, or leave the flag out"
        )
    if target is None:
        less = [letter for letter in "DQKFL" if letter in "DFL" + _ATTENTION[units or "groups"]]
    if not less:
        raise ConfigError(
            "nothing is to be pruned: give at least one of --hidden-size-remain, "
            "--ffn-hidden-size-remain, --num-attention-heads-remain, --num-query-groups-remain and "
            "--num-layers-remain below the model's, or --target-params"
        )
    parts = {"Q": shape.num_query_groups, "K": ranks, "F": ranks}
    return tuple(
        Gated(
            letter=letter,
            rows=shape.num_layers if AXES[letter].is_per_layer else 1,
            size=shape.size(letter),
            keep=keep[letter],
            parts=parts.get(letter, 1),
        )
        for letter in less
    )


def count(axes: Sequence[Gated]) -> int:
    """All gates of a model."""
    return sum(axis.rows * axis.size for axis in axes)


def blocks(flat: Tensor, axes: Sequence[Gated]) -> dict[str, Tensor]:
    """The vector of all gates by axis letter, as views [rows, size]."""
    parts = flat.split([axis.rows * axis.size for axis in axes])
    return {axis.letter: part.view(axis.rows, axis.size) for axis, part in zip(axes, parts)}


def expected_parameters(
    present: Mapping[str, Tensor], shape: ModelShape, layer: Sequence[str], outer: Sequence[str]
) -> Tensor:
    """Expected parameters of the model, as Sheared LLaMA counts them, for grouped queries.

    With one head in each group and ``layer`` the matrices alone it is its ``(sum hidden) x ((sum
    layer x head) x 4 D / H + (sum layer x intermediate) x 3)``; a head of a group of several costs
    its query and output rows alone, and the group its key and value rows.

    Args:
        present: axis letter -> [rows, size] how likely each unit is to stay; axes that are missing
            stay whole.
        layer, outer: the axes of each weight of a layer and outside, such as ``QD``.

    Returns:
        [] float32.
    """
    layers = shape.num_layers

    def size(letter: str) -> Tensor:
        found = present.get(letter)
        whole = torch.full((layers,), float(shape.size(letter)))
        return whole if found is None else found.sum(1).expand(layers)

    sizes = {letter: size(letter) for letter in AXES if letter != "L"}
    if "K" in present:
        of_group = present["K"].repeat_interleave(shape.heads_per_group, 1)
        sizes["Q"] = (of_group * present["Q"] if "Q" in present else of_group).sum(1)
    stays = present["L"][0] if "L" in present else torch.ones(layers)

    def weights(tensors: Sequence[str]) -> Tensor:
        """[L] of all these tensors."""
        total = torch.zeros(layers)
        for axes in tensors:
            total = total + prod([sizes[axis] * shape.rows(axis) for axis in axes])
        return total

    inside = (stays * weights(layer)).sum()
    return inside + weights(outer)[0] if outer else inside
