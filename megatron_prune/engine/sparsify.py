"""One-shot sparsity of a model that is run one layer at a time: zeros in its linears.

Layer by layer in the order of the forward pass: gather what enters each linear while the layer is
still as the source has it, prune all of its linears, and move the hidden states on through the
pruned layer; so each layer is pruned for what the pruned layers before it make. With
``true_sequential`` the linears of a layer are pruned one input after the other: what enters
``linear_proj`` is then what the pruned q, k and v make.

The rows of a matrix do not depend on each other once the statistics of its inputs are there. They
are dealt out over all ranks, whatever the layout of the forward pass is: each reads the rows it
prunes from the source, and what has to be the same for all rows (a threshold of the whole matrix)
is agreed on by `kselect`. So time falls with the number of ranks, and the result does not depend
on it but for rounding.

Price: two forward passes, and what the method takes. Per rank ``I^2 / TP * 8`` bytes of second
moments for each input of a layer where a method needs them, ``I^2 * 4`` of the one that is worked
on and what the method prepares of it, the rows it prunes in float32, and on the first rank one
whole matrix; on top of `layerwise`.

Shape suffixes: s sequence, b batch (1), R this rank's rows, O all rows, I inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.engine.failures import on_first_rank, together
from megatron_prune.engine.forward.model import ModelOptions
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.observe.inputs import InputSums, gathered
from megatron_prune.engine.observe.layerwise import Layer, Stream
from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import axes_of, layer_name, split_dim, tensor_shape
from megatron_prune.model.family import Half
from megatron_prune.model.shape import ModelConfig
from megatron_prune.solve.kselect import Dealt
from megatron_prune.sources.repair_record import digests
from megatron_prune.sources.replaced import RepairedSource, Tensors
from megatron_prune.sources.source import Source
from megatron_prune.sources.sparsity_record import SparseMatrix
from megatron_prune.sparsity.allocation import outlier_counts
from megatron_prune.sparsity.facts import facts_of, rounded_share
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Prepared


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is done to a model.

    Attributes:
        asked: of each layer.
        targets: canonical names of the matrices that are pruned.
        true_sequential: prune a layer's inputs one after the other.
        upstream_statistics: the k-th window's squares count 1 / k of themselves.
    """

    method: Method
    how: How
    asked: Sequence[Asked]
    targets: Collection[str]
    true_sequential: bool = False
    upstream_statistics: bool = False


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the model is run on, and how.

    Attributes:
        windows_WS: [W, S] int64, the same on every rank.
    """

    windows_WS: Tensor
    model: ModelOptions


@dataclass(frozen=True, kw_only=True)
class Sparsified:
    """What became of the matrices, the same on every rank.

    Attributes:
        matrices: by canonical name.
        close: decisions that were within rounding.
        dead: canonical names of matrices some of whose inputs never fired, and how many.
    """

    matrices: Mapping[str, SparseMatrix]
    close: int
    dead: Mapping[str, int]


def sparsify(
    source: Source,
    task: Task,
    calibration: Calibration | None,
    groups: Groups,
    into: Tensors,
    progress: Callable[[int], object] = lambda layers: None,
) -> Sparsified:
    """Prune the matrices of every layer; the new ones are put ``into`` a scratch directory.

    Args:
        calibration: None for a method that needs weights alone.
        progress: told of each layer done.

    Raises:
        DamagedError: inputs that are not finite on the calibration text, or weights that came out
            so; names the tensor.
        DistributedError: another rank met an error.
    """
    run = _Sparsifying(source, task, calibration, groups, into)
    for layer in range(source.config.shape.num_layers):
        run.layer(layer)
        progress(1)
    return Sparsified(matrices=run.matrices, close=run.close, dead=run.dead)


def outlier_shares(
    source: Source,
    targets: Collection[str],
    multiple: float,
    calibration: Calibration,
    groups: Groups,
    progress: Callable[[int], object] = lambda layers: None,
) -> list[float]:
    """Of each layer of the dense model the share of weights that OWL calls outliers: those whose
    Wanda score is more than ``multiple`` times the mean of their layer's.

    One pass through the model.

    Raises:
        DamagedError, DistributedError: see `sparsify`.
    """
    dealt, shares = _dealt(groups), []
    walk = _Walk(source, calibration, groups)
    for layer in range(source.config.shape.num_layers):
        walk.load(source, layer)
        metrics = []
        sums = walk.observe(_inputs(source.config, layer, targets), gram=False)
        for group, total in sums.items():
            roots = _reduced(source, group.names(layer)[0], total, walk.windows).squares_I.sqrt()
            for name in group.targeted(layer, targets):
                rows = _rows(source, name, groups)
                metrics.append(rows.abs() * roots.float())
        outliers, of = outlier_counts(metrics, dealt, multiple)
        shares.append(outliers / of)
        for half in source.config.family.halves:
            walk.advance(half)
        progress(1)
    return shares


@dataclass(frozen=True)
class _Group:
    """The linears of a layer that share an input: a norm's readers, or a half's projection."""

    half: Half
    is_projection: bool

    def names(self, layer: int) -> list[str]:
        modules = (self.half.output,) if self.is_projection else self.half.inputs
        return [layer_name(layer, f"{module}.weight") for module in modules]

    def targeted(self, layer: int, targets: Collection[str]) -> list[str]:
        return [name for name in self.names(layer) if name in targets]


def _inputs(config: ModelConfig, layer: int, targets: Collection[str]) -> list[_Group]:
    """The groups of a layer of which any linear is a target, in the order of the forward pass."""
    groups = [_Group(half, proj) for half in config.family.halves for proj in (False, True)]
    return [group for group in groups if group.targeted(layer, targets)]


class _Walk:
    """A layer, the hidden states before it, and what is seen on the way through it."""

    def __init__(self, source: Source, calibration: Calibration, groups: Groups) -> None:
        self._config, self._groups = source.config, groups
        self._layer = Layer(source.config, groups, calibration.model)
        self._stream = Stream(source, calibration.windows_WS, groups, calibration.model.dtype)
        self.windows = len(calibration.windows_WS)
        self._ahead = source.config.family.halves  # of the layer, those not passed yet

    def load(self, source: Source, layer: int) -> None:
        self._layer.load(source, layer)

    def observe(
        self, wanted: Collection[_Group], *, gram: bool, upstream: bool = False
    ) -> dict[_Group, InputSums]:
        """What enters some linears of the layer, over this rank's windows; the hidden states stay
        where they are."""
        shape = self._config.shape
        sums = {
            group: InputSums(tensor_shape(group.names(0)[0], shape)[1], self._groups, gram=gram)
            for group in wanted
        }
        for at, x in enumerate(self._stream):
            number = at * self._groups.data_parallel + self._groups.dp_rank
            self._through(x, sums, 1 / (number + 1) if upstream else 1.0)
        return sums

    def _through(self, x: Tensor, sums: Mapping[_Group, InputSums], weight: float) -> None:
        left = len(sums)
        for half in self._ahead:
            if (readers := sums.get(_Group(half, False))) is not None:
                readers.add(self._layer.normed(half, x).flatten(0, 1), weight)
                left -= 1
            if not left:
                return
            seen: list[Tensor] = []
            out = self._layer.run(half, x, seen.append)
            if (projection := sums.get(_Group(half, True))) is not None:
                projection.add(gathered(seen[0], self._groups), weight)
                left -= 1
            x = x + out

    def advance(self, half: Half) -> None:
        """Move all windows through a half of the layer, the next one."""
        assert half is self._ahead[0], "halves are passed in their order"
        self._stream.advance(self._layer, half)
        self._ahead = self._ahead[1:] or self._config.family.halves


class _Sparsifying:
    """The model so far pruned, and what was found."""

    def __init__(
        self,
        source: Source,
        task: Task,
        calibration: Calibration | None,
        groups: Groups,
        into: Tensors,
    ) -> None:
        self._source, self._task, self._groups, self._into = source, task, groups, into
        self._dealt = _dealt(groups)
        self._pruned = RepairedSource(source, into)
        self._walk = None if calibration is None else _Walk(source, calibration, groups)
        self.matrices: dict[str, SparseMatrix] = {}
        self.close, self.dead = 0, dict[str, int]()

    def layer(self, layer: int) -> None:
        wanted = _inputs(self._source.config, layer, self._task.targets)
        walk = self._walk
        if walk is None:
            for group in wanted:
                self._prune(layer, group, None)
            return
        walk.load(self._source, layer)
        if self._task.true_sequential:
            self._one_after_the_other(walk, layer, wanted)
            return
        self._prune_all(walk, layer, wanted)
        if wanted:
            walk.load(self._pruned, layer)
        for half in self._source.config.family.halves:
            walk.advance(half)

    def _one_after_the_other(self, walk: _Walk, layer: int, wanted: Collection[_Group]) -> None:
        for half in self._source.config.family.halves:
            for group in (_Group(half, False), _Group(half, True)):
                if group in wanted:
                    self._prune_all(walk, layer, [group])
                    walk.load(self._pruned, layer)
            walk.advance(half)

    def _prune_all(self, walk: _Walk, layer: int, wanted: Collection[_Group]) -> None:
        if not wanted:
            return
        task = self._task
        sums = walk.observe(
            wanted, gram=task.method.needs == "gram", upstream=task.upstream_statistics
        )
        for group in wanted:
            first = group.names(layer)[0]
            self._prune(layer, group, _reduced(self._source, first, sums.pop(group), walk.windows))

    def _prune(self, layer: int, group: _Group, inputs: Inputs | None) -> None:
        """The linears of a group."""
        task, names = self._task, group.targeted(layer, self._task.targets)
        prepared = {} if inputs is None else self._prepared(names, inputs)
        if (dead := prepared.get("dead_I")) is not None and bool(dead.any()):
            self.dead.update(dict.fromkeys(names, int(dead.sum())))
        weights = together(
            self._groups.ranks,
            lambda: [_rows(self._source, name, self._groups) for name in names],
        )
        asked = task.asked[layer]
        done = task.method.prune(weights, prepared, asked, task.how, self._dealt)
        for name, before, after in zip(names, weights, done):
            self._keep(name, before, after.weight_RI, after.close, asked, inputs)

    def _prepared(self, names: Sequence[str], inputs: Inputs) -> Prepared:
        """What the method makes of the inputs, on the first rank, for all."""
        task, ranks, device = self._task, self._groups.ranks, self._groups.device
        found: Prepared = {}

        def prepare() -> list[tuple[str, torch.Size, torch.dtype]]:
            nonlocal found
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                made = task.method.prepare(inputs, task.how)
            for one in told:
                warnings.warn(f"{self._source.path}: {names[0]}: {one.message}", stacklevel=2)
            found = {name: x.contiguous() for name, x in made.items()}  # as broadcast takes it
            return [(name, x.shape, x.dtype) for name, x in found.items()]

        given = {}
        for name, shape, dtype in on_first_rank(ranks, prepare):
            x = found[name] if ranks.is_first else torch.empty(shape, dtype=dtype, device=device)
            dist.broadcast(x, 0)
            given[name] = x
        return given

    def _keep(
        self,
        name: str,
        before_RI: Tensor,
        after_RI: Tensor,
        close: int,
        asked: Asked,
        inputs: Inputs | None,
    ) -> None:
        """Join the rows, write them down, and note what became of the matrix."""
        dtype, updates = self._source.dtype(name), self._task.method.updates
        stored = after_RI.to(dtype)
        facts = facts_of(before_RI, stored.float(), inputs)
        close_, zeros, count, energy, energies, error, size, bad = self._dealt.total(
            torch.cat([torch.tensor([float(close)], dtype=torch.float64), facts.cpu()])
        ).tolist()
        if bad:
            raise DamagedError(
                f"{self._source.path}: the sparse {name} is not finite in {dtype}; "
                + (
                    "convert the source with --dtype fp32 or bf16 first"
                    if dtype == torch.float16
                    else "it or what enters it is too large to compute with: look at the model, or "
                    "leave it out with --ignore"
                )
            )
        self.close += int(close_)
        whole = _joined(stored, tensor_shape(name, self._source.config.shape), self._groups)
        first = self._groups.ranks.is_first
        hashes = on_first_rank(
            self._groups.ranks, lambda: digests(whole.cpu()) if updates else None
        )
        together(
            self._groups.ranks,
            lambda: self._into.put(name, whole.cpu(), here=first),
        )
        self.matrices[name] = SparseMatrix(
            asked=asked.share,
            pattern=None if asked.pattern is None else str(asked.pattern),
            reached=zeros / count,
            energy=rounded_share(energy, energies),
            error=rounded_share(max(error, 0) ** 0.5, size**0.5) if size > 0 else None,
            sha256=hashes,
        )


def _dealt(groups: Groups) -> Dealt:
    def total(x: Tensor) -> Tensor:
        summed = x.to(groups.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(x.device)

    ranks = groups.ranks
    return Dealt(rank=ranks.rank, ranks=ranks.world_size, total=total)


def _rows(source: Source, name: str, groups: Groups) -> Tensor:
    """The rows of a matrix that are this rank's to prune: [R, I] float32 on the device."""
    axes, shape = axes_of(name), source.config.shape
    height, width = tensor_shape(name, shape)
    rank, ranks = groups.ranks.rank, groups.ranks.world_size
    start, stop = height * rank // ranks, height * (rank + 1) // ranks
    if start == stop:
        return torch.zeros(0, width, device=groups.device)
    if split_dim(axes) != 0:
        rows = source.read(name)[start:stop]
    else:
        per = shape.rows(axes[0])
        first = start // per
        rows = source.read(name, first, -(-stop // per))[start - first * per : stop - first * per]
    return rows.to(groups.device, torch.float32)


def _joined(rows_RI: Tensor, shape: Sequence[int], groups: Groups) -> Tensor:
    """All ranks' rows on the first rank, [O, I]; elsewhere nothing."""
    ranks = groups.ranks.world_size
    if ranks == 1:
        return rows_RI
    height, width = shape
    bounds = [height * rank // ranks for rank in range(ranks + 1)]
    most = max(stop - start for start, stop in pairwise(bounds))
    mine = rows_RI.new_zeros(most, width)
    mine[: len(rows_RI)] = rows_RI
    wire = mine.view(torch.uint8)  # gloo does not know every dtype
    parts = [torch.empty_like(wire) for _ in range(ranks)] if groups.ranks.is_first else None
    dist.gather(wire, parts)
    if parts is None:
        return rows_RI[:0]
    return torch.cat(
        [
            part.view(rows_RI.dtype)[: stop - start]
            for part, (start, stop) in zip(parts, pairwise(bounds))
        ]
    )


def _reduced(source: Source, name: str, sums: InputSums, windows: int) -> Inputs:
    inputs = sums.reduce(windows)
    numbers = [inputs.squares_I]
    if inputs.gram_II is not None:  # what is off its diagonal is no larger than what is on it
        numbers.append(inputs.gram_II.diagonal())
    if not all(bool(x.isfinite().all()) for x in numbers):
        raise DamagedError(
            f"{source.path}: what enters {name} is not finite on the calibration text; the weights "
            "before it hold values that are not finite, or the precision is too narrow for them"
        )
    return inputs
