"""A shape from a budget: every legal shape that fits, ranked by what the scores say it loses.

This is arithmetic on sizes and scores; no file and no weight is read. It decides sizes only: which
units go is the plan's business (`planning`), made with the same scores afterwards.

A shape is legal when
- hidden and FFN are multiples for tensor cores (`default_multiple`), FFN on every tensor-parallel
  rank too; the source's own size is legal as it is;
- heads are equally many in each query group; groups stay or, when allowed, go as a whole; groups,
  and with them heads, and FFN divide by the tensor-parallel size;
- hidden is a multiple of heads, where the family's loader insists on it;
- it is no deeper than the source and no shallower than ``min_layers``;
- FFN : hidden and attention width : hidden are within a factor ``proportions`` of the source's.

Costs grow with every size, so for given layers, hidden, groups and heads only the largest FFN that
fits matters, and bisection finds it for all of them at once: a 70B model (80 layers, hidden 8192,
FFN 28672) takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, lcm
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import PlanError
from megatron_prune.model.costs import Sizes, sizes_of
from megatron_prune.model.lazy import np
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.score_mass import ScoreMass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

TENSOR_CORE = 64  # values; NVIDIA's GEMM guide: fastest where sizes are multiples of 128 bytes
_RANK_MULTIPLE = 8  # values a rank: 16 bytes of bf16, below which no tensor core is used
_STEPS = 16  # an axis shorter than 16 x 64 gets a smaller multiple, or it would have no choices
APART = 0.05
PROPORTIONS = 2.0
_PROBE = 0.75
_EPSILON = 1e-9  # of the proportions, which are quotients of floats


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One limit. ``cost`` grows with every size; `words` says it in ``unit``.

    Attributes:
        flag: the option that set it, for messages.
        scale: how much cost makes one ``unit``.
    """

    name: str
    flag: str
    limit: float
    cost: Callable[[Sizes], Any]
    unit: str
    scale: float = 1.0

    def words(self, cost: float) -> str:
        return f"{cost / self.scale:,.6g} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The legal shapes: choices per axis, and rules between axes.

    Attributes:
        layers, hidden, ffn: sizes to choose from, ascending.
        attention: (query groups, heads in each) to choose from.
        proportions: 1 or more.
    """

    source: ModelShape
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    ffn: tuple[int, ...]
    attention: tuple[tuple[int, int], ...]
    proportions: float
    hidden_multiple_of_heads: bool


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A shape that fits; ``proxy`` as `ScoreMass` defines it, ``costs`` by the budgets' names."""

    shape: ModelShape
    proxy: float
    costs: Mapping[str, float]


def default_multiple(size: int) -> int:
    """64, or for an axis shorter than 1024 the largest power of two of which 16 fit."""
    multiple = TENSOR_CORE
    while multiple > 1 and multiple * _STEPS > size:
        multiple //= 2
    return multiple


def search_space(
    shape: ModelShape,
    *,
    balance_for: int = 1,
    multiple_of: int | None = None,
    min_layers: int | None = None,
    proportions: float = PROPORTIONS,
    hidden_multiple_of_heads: bool = False,
    drop_query_groups: bool = False,
    fixed: Mapping[str, int] | None = None,
) -> SearchSpace:
    """The legal shapes below ``shape``.

    Args:
        balance_for: TP size that has to divide groups, heads and FFN.
        multiple_of: of hidden and FFN; default `default_multiple` of each.
        min_layers: default half of the source's, rounded up.
        drop_query_groups: whole groups may go. In a model with one head a group they always may.
        fixed: axis letter -> the one size that is wanted of it, taken as legal.

    Raises:
        PlanError: an option out of range.
        ShapeError: ``balance_for`` does not divide the source.
    """
    fixed = fixed or {}
    shape.check_tensor_parallel(balance_for)
    fewest = ceil(shape.num_layers / 2) if min_layers is None else min_layers
    if not 1 <= fewest <= shape.num_layers:
        raise PlanError(
            f"--min-layers {fewest}: the model has {shape.num_layers}; wanted 1 to that"
        )
    if proportions < 1:
        raise PlanError(
            f"--proportions {proportions}: is a factor either way; wanted 1 or more (2: FFN and "
            "attention may become twice or half as wide, against hidden, as they are)"
        )
    if multiple_of is not None and multiple_of < 1:
        raise PlanError(f"--multiple-of {multiple_of}: wanted 1 or more")
    for axis, size in fixed.items():
        if not 1 <= size <= shape.size(axis):
            raise PlanError(
                f"axis {axis}: {size} is asked for; wanted 1 to {shape.size(axis)}, as it has"
            )
        if axis in "FK" and size % balance_for:
            raise PlanError(
                f"axis {axis}: {size} is asked for; wanted a multiple of --balance-for "
                f"{balance_for}, or every rank's part would not be of one size"
            )
    ffn_step = multiple_of or default_multiple(shape.ffn_hidden_size)
    ffn_step = lcm(ffn_step, balance_for * min(_RANK_MULTIPLE, ffn_step))
    hidden_step = multiple_of or default_multiple(shape.hidden_size)

    def choices(axis: str, step: int, first: int) -> tuple[int, ...]:
        size = shape.size(axis)
        if axis in fixed:
            return (fixed[axis],)
        return (*(n for n in range(first, size) if n % step == 0), size)

    return SearchSpace(
        source=shape,
        layers=choices("L", 1, fewest),
        hidden=choices("D", hidden_step, hidden_step),
        ffn=choices("F", ffn_step, ffn_step),
        attention=_attention(shape, balance_for, drop_query_groups, fixed),
        proportions=proportions,
        hidden_multiple_of_heads=hidden_multiple_of_heads,
    )


def _attention(
    shape: ModelShape, balance_for: int, drop_query_groups: bool, fixed: Mapping[str, int]
) -> tuple[tuple[int, int], ...]:
    groups: Sequence[int] = (shape.num_query_groups,)
    if drop_query_groups or shape.heads_per_group == 1:
        groups = range(balance_for, shape.num_query_groups + 1, balance_for)
    if "K" in fixed:
        groups = (fixed["K"],)
    found = tuple(
        (number, per_group)
        for number in groups
        for per_group in range(1, shape.heads_per_group + 1)
        if fixed.get("Q", number * per_group) == number * per_group
    )
    if not found:
        most = max(groups)
        legal = [most * n for n in range(1, shape.heads_per_group + 1)]
        raise PlanError(
            f"--num-attention-heads-remain {fixed['Q']} over {most} query groups: keep equally "
            f"many in every group ({', '.join(map(str, legal))})"
        )
    return found


def axis_probes(space: SearchSpace) -> dict[str, ModelShape]:
    """For each axis that has a choice, the source with that axis alone cut, to 3/4 or as near as
    it goes: what `ScoreMass.calibrated` is measured on. Not all of them are legal shapes."""
    source, probes = space.source, {}
    heads = [groups * per_group for groups, per_group in space.attention]
    for name, field, choices in (
        ("layers", "num_layers", space.layers),
        ("hidden", "hidden_size", space.hidden),
        ("ffn", "ffn_hidden_size", space.ffn),
        ("heads", "num_attention_heads", heads),
    ):
        size = getattr(source, field)
        smaller = [n for n in choices if n < size]
        if not smaller or len(set(choices)) == 1:
            continue
        near = min(smaller, key=lambda n: (abs(n - _PROBE * size), -n))
        groups, per_group = source.num_query_groups, source.heads_per_group
        if name == "heads":
            groups, per_group = space.attention[heads.index(near)]
        changes: dict[str, Any] = {
            "num_query_groups": groups,
            "num_attention_heads": groups * per_group,
        }
        probes[name] = replace(source, **{**changes, **({} if name == "heads" else {field: near})})
    return probes


@dataclass(frozen=True)
class _Rows:
    """One row a choice of layers, hidden and attention; its legal FFN are ``ffn[first..last]``."""

    layers: Ints
    hidden: Ints
    groups: Ints
    per_group: Ints
    first: Ints
    last: Ints

    def only(self, mask: NDArray[np.bool_]) -> _Rows:
        return _Rows(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def sizes(self, ffn: Ints, vocab: int) -> dict[str, Any]:
        """`Sizes` of every row with these FFN widths."""
        return {
            "V": vocab,
            "D": self.hidden,
            "Q": self.groups * self.per_group,
            "K": self.groups,
            "F": ffn,
            "L": self.layers,
        }


def _rows(space: SearchSpace) -> _Rows:
    source, band = space.source, space.proportions * (1 + _EPSILON)
    pairs = np.array(space.attention, dtype=np.int64)
    index = np.indices((len(space.layers), len(space.hidden), len(pairs))).reshape(3, -1)
    layers = np.array(space.layers, dtype=np.int64)[index[0]]
    hidden = np.array(space.hidden, dtype=np.int64)[index[1]]
    groups, per_group = pairs[index[2]].T
    heads, ffn = groups * per_group, np.array(space.ffn, dtype=np.int64)
    ratio = heads * source.hidden_size / (hidden * source.num_attention_heads)
    legal = (ratio <= band) & (ratio >= 1 / band)
    if space.hidden_multiple_of_heads:
        legal &= hidden % heads == 0
    same = hidden * source.ffn_hidden_size / source.hidden_size  # FFN of the source's proportion
    first = np.searchsorted(ffn, same / band, side="left")
    last = np.searchsorted(ffn, same * band, side="right") - 1
    rows = _Rows(layers, hidden, groups, per_group, first, last)
    return rows.only(legal & (first <= last))


def search(
    space: SearchSpace,
    budgets: Sequence[Budget],
    mass: ScoreMass,
    count: int,
    *,
    apart: float = APART,
) -> list[Candidate]:
    """The ``count`` best shapes within all budgets, best first; fewer when there are fewer.

    Each is maximal: no legal shape within the budgets is as large in every way (layers, hidden,
    groups, heads in each, FFN) and larger in one. Ranked by ``mass.loss_at``; equal ones prefer
    more layers, then hidden, groups, heads and FFN.

    Args:
        apart: a shape is passed over when a better one found before it is nearer than this share of
            the source's size in all of layers, hidden, heads and FFN; 0 passes none over. The best
            of a fine grid are one shape many times, and trying them would tell nothing.

    Raises:
        PlanError: nothing fits; names the nearest shapes.
    """
    rows, ffn = _largest(space, budgets)
    return _best(space, rows, ffn, budgets, mass, count, apart)


def search_front(
    space: SearchSpace,
    budget: Budget,
    mass: ScoreMass,
    limits: Sequence[float],
    count: int,
    *,
    apart: float = APART,
) -> list[Candidate]:
    """The ``count`` best shapes at each of several limits of one cost, without repeats, by cost:
    what a picture of cost against loss is drawn from. A limit that nothing meets is left out."""
    found: dict[ModelShape, Candidate] = {}
    for limit in limits:
        at = replace(budget, limit=limit)
        try:
            best = search(space, [at], mass, count, apart=apart)
            found |= {candidate.shape: candidate for candidate in best}
        except PlanError:
            continue
    return sorted(found.values(), key=lambda candidate: candidate.costs[budget.name])


def _largest(space: SearchSpace, budgets: Sequence[Budget]) -> tuple[_Rows, Ints]:
    """The rows that fit with some FFN, and the largest one for each."""
    rows, ffn = _rows(space), np.array(space.ffn, dtype=np.int64)
    if not len(rows.layers):
        raise PlanError(
            "no shape of this model is legal, not even its own: "
            f"{space.source.as_dict()} with proportions within {space.proportions:g}"
            + (" and hidden a multiple of heads" if space.hidden_multiple_of_heads else "")
            + "; widen --proportions or name other sizes"
        )

    def over(rows: _Rows, index: Ints) -> NDArray[np.float64]:
        """The worst of cost / limit over the budgets: above 1 it does not fit."""
        sizes = rows.sizes(ffn[index], space.source.vocab_size)
        shares = [np.asarray(b.cost(sizes), dtype=np.float64) / b.limit for b in budgets]
        return np.maximum.reduce(shares)

    smallest = over(rows, rows.first)
    fits = smallest <= 1
    if not fits.any():
        raise _nothing_fits(space, rows, ffn[rows.first], budgets, smallest)
    rows = rows.only(fits)
    low, high = rows.first.copy(), rows.last.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        ok = over(rows, middle) <= 1
        low, high = np.where(ok, middle, low), np.where(ok, high, middle - 1)
    return rows, ffn[low]


def _best(
    space: SearchSpace,
    rows: _Rows,
    ffn: Ints,
    budgets: Sequence[Budget],
    mass: ScoreMass,
    count: int,
    apart: float,
) -> list[Candidate]:
    """The best maximal rows that are apart. What is as large in every way loses no more and so
    stands earlier in the order: only rows before one can show that it is not maximal."""
    source = space.source
    proxy = mass.loss_at(rows.sizes(ffn, source.vocab_size))
    columns = np.stack([rows.layers, rows.hidden, rows.groups, rows.per_group, ffn])
    order = np.lexsort([*(-columns[::-1]), proxy])
    columns, proxy = columns[:, order], proxy[order]
    shares = np.stack([columns[0], columns[1], columns[2] * columns[3], columns[4]]) / np.array(
        [[source.size(axis)] for axis in "LDQF"]
    )
    alive = np.ones(len(proxy), dtype=np.bool_)
    found: list[Candidate] = []
    while alive.any() and len(found) < count:
        at = int(alive.argmax())
        larger = (columns[:, :at] >= columns[:, at : at + 1]).all(axis=0)
        if larger.any():  # the first that is larger is maximal itself
            first = int(larger.argmax())
            alive &= (columns > columns[:, first : first + 1]).any(axis=0)
            continue
        shape = _shape(source, *map(int, columns[:, at]))
        found.append(Candidate(shape=shape, proxy=float(proxy[at]), costs=_costs(shape, budgets)))
        alive &= (columns > columns[:, at : at + 1]).any(axis=0)
        alive &= (np.abs(shares - shares[:, at : at + 1]) >= apart).any(axis=0)
    return found


def _shape(
    source: ModelShape, layers: int, hidden: int, groups: int, per_group: int, ffn: int
) -> ModelShape:
    return replace(
        source,
        num_layers=layers,
        hidden_size=hidden,
        num_query_groups=groups,
        num_attention_heads=groups * per_group,
        ffn_hidden_size=ffn,
    )


def _costs(shape: ModelShape, budgets: Sequence[Budget]) -> dict[str, float]:
    sizes = sizes_of(shape)
    return {budget.name: float(budget.cost(sizes)) for budget in budgets}


def shape_words(shape: ModelShape) -> str:
    """A shape in one line of a message."""
    return (
        f"{shape.num_layers} layers, hidden {shape.hidden_size}, {shape.num_attention_heads} heads "
        f"in {shape.num_query_groups} groups, FFN {shape.ffn_hidden_size}"
    )


def _nothing_fits(
    space: SearchSpace,
    rows: _Rows,
    ffn: Ints,
    budgets: Sequence[Budget],
    over: NDArray[np.float64],
) -> PlanError:
    """What to say: the two legal shapes that come nearest, and what they cost."""
    near = []
    for row in np.argsort(over, kind="stable")[:2]:
        numbers = (rows.layers, rows.hidden, rows.groups, rows.per_group, ffn)
        shape = _shape(space.source, *(int(x[row]) for x in numbers))
        costs = _costs(shape, budgets)
        prices = ", ".join(budget.words(costs[budget.name]) for budget in budgets)
        near.append(f"{shape_words(shape)} ({prices})")
    wanted = " and ".join(f"{b.flag} {b.words(b.limit)}" for b in budgets)
    return PlanError(
        f"{wanted}: no legal shape is so small; nearest: {' or '.join(near)}. Ask for more, or "
        "allow more with --min-layers, --proportions, --multiple-of or --drop-query-groups"
    )
