"""Repair of a pruned model in closed form: layer by layer, least squares and norm rescaling.

The model is first cut in hidden channels and layers, its norms rescaled; heads and FFN channels are
still whole. Then, layer by layer in the order of the forward pass: run attention over the
calibration text, collect the second moments of what enters ``linear_proj``, solve for the weight
that does best with the kept heads alone, and move the hidden states on with it; the same for the
MLP and ``linear_fc2``. So each layer is fitted on what the repaired layers before it make, errors
included.

Price: one forward pass (two with a dense target), and per projection one float64 solve on the first
rank. Per rank ``K (K + D) / TP * 8`` bytes of moments, ``K (K + D) * 8`` while they are solved, K
the kept inputs (a 70B keeping 18432 of 28672 channels at TP=8: 0.5 GiB and 3.7 GiB), and on the
host the kept inputs of all windows, ``tokens / DP * K / TP`` values; on top of `layerwise`.

Shape suffixes: s sequence, b batch (1), T tokens, D hidden, K kept inputs, N all inputs, n this
rank's inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.axes import FINAL_NORM, layer_name
from megatron_prune.engine.failures import together
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.layerwise import HALVES, Half, Layer, Stream
from megatron_prune.engine.model import ModelOptions
from megatron_prune.errors import DamagedError
from megatron_prune.least_squares import Affine, Moments, fit, norm_ratio, relative_error
from megatron_prune.plan import PrunePlan
from megatron_prune.repair import (
    NORMS,
    STATISTICS,
    TARGETS,
    RepairedSource,
    Replaced,
    Tensors,
    digests,
    without_units,
)
from megatron_prune.source import Source
from megatron_prune.surgery import PrunedSource
from megatron_prune.tensors import expand_rows


@dataclass(frozen=True, kw_only=True)
class RepairOptions:
    """How projections are fitted.

    Attributes:
        model: of the calibration's forward passes.
        damping: see `least_squares.fit`.
        statistics: ``sequential``, inputs as the repaired layers below make them, or ``dense``, as
            the unpruned model does.
        target: what the fitted output should be. ``own``: what the layer with all its heads and
            channels makes of the same input. ``dense``: what the unpruned model's layer makes of
            its own. ``stream``: what brings the hidden state to the unpruned model's, errors of all
            layers before included.
    """

    model: ModelOptions
    damping: float
    statistics: str = "sequential"
    target: str = "own"

    def __post_init__(self) -> None:
        assert self.statistics in STATISTICS and self.target in TARGETS
        assert self.target == "own" or self.statistics == "sequential"


def rescale_norms(
    source: Source, plan: PrunePlan, energy: Tensor, groups: Groups, into: Tensors
) -> dict[str, Replaced]:
    """Multiply each norm's weight by `least_squares.norm_ratio`; returns what was replaced.

    Args:
        energy: [2 L + 1, D] of ``source``, as `layerwise.norm_energy` gives it.
    """
    pruned, hidden = PrunedSource(source, plan), plan.tensor("D")
    rows = {FINAL_NORM.name: energy[-1]}
    for layer, old in enumerate(plan.layers):
        for half, norm in enumerate(NORMS):
            rows[layer_name(layer, norm)] = energy[2 * old + half]
    done = {}
    for name, energy_D in rows.items():
        ratio = norm_ratio(energy_D, hidden)
        x = pruned.read(name)
        scaled = (x.double() * ratio).to(x.dtype)
        _put(into, name, scaled, groups)
        done[name] = Replaced(
            how="norm-rescale", sha256=digests(scaled), ratio=float(f"{ratio:.6g}")
        )
    return done


def repair_projections(
    source: Source,
    plan: PrunePlan,
    windows_WS: Tensor,
    options: RepairOptions,
    groups: Groups,
    into: Tensors,
    progress: Callable[[int], object] = lambda layers: None,
) -> dict[str, Replaced]:
    """Fit every ``linear_proj`` and ``linear_fc2`` that lost inputs; returns what was replaced.

    With a target other than ``own`` those that lost none are fitted too.

    Args:
        windows_WS: [W, S] int64 of the source's vocabulary, the same on every rank.
        into: holds the rescaled norms; is given the fitted weights.
        progress: told of each layer done.

    Raises:
        DamagedError: moments or a fitted weight that are not finite; names the tensor.
        ConfigError: see `least_squares.fit`.
        DistributedError: the first rank met one of these.
    """
    run = _Repairing(source, plan, windows_WS, options, groups, into)
    for layer, old in enumerate(plan.layers):
        run.layer(layer, old)
        progress(1)
    return run.done


def _put(into: Tensors, name: str, x: Tensor, groups: Groups) -> None:
    """Keep a replaced tensor where all ranks can read it; they all have the same."""
    if not bool(x.isfinite().all()):
        raise DamagedError(
            f"the repaired {name} (layers as in the pruned model) is not finite in {x.dtype}, the "
            "source's dtype: the fit is too large for it; raise --repair-damping, or convert the "
            "source with --dtype fp32 or bf16 first"
        )
    together(groups.ranks, lambda: into.put(name, x, here=groups.ranks.is_first))


class _Sums:
    """Moments while they grow: this tensor-parallel rank's rows of the matrices.

    Products of one window are float32, sums over windows float64.

    Attributes:
        inputs: of each window, this rank's share of the kept inputs [T, rows], on the host; if it
            ``keeps`` them.
        rows: which of the kept inputs are its share.
    """

    def __init__(self, kept_K: Tensor, outputs: int, groups: Groups, *, keeps: bool) -> None:
        inputs, parts, part = len(kept_K), groups.grid.tensor_parallel, groups.tp_rank
        self._groups, self._kept_K, self._count = groups, kept_K.to(groups.device), 0
        self.inputs: list[Tensor] = []
        self._keeps = keeps
        self.rows = slice(inputs * part // parts, inputs * (part + 1) // parts)
        self._outs = slice(outputs * part // parts, outputs * (part + 1) // parts)
        new = partial(torch.zeros, dtype=torch.float64, device=groups.device)
        self._gram = new(self.rows.stop - self.rows.start, inputs)
        self._cross = new(self._outs.stop - self._outs.start, inputs)
        self._input_sum, self._target_sum, self._square = new(inputs), new(outputs), new(1)

    def add(self, input_sbn: Tensor, target_TD: Tensor) -> None:
        """One window: what entered the projection on this rank, and what should leave it."""
        parts = [torch.empty_like(input_sbn) for _ in range(self._groups.grid.tensor_parallel)]
        dist.all_gather(parts, input_sbn.contiguous(), group=self._groups.tp_group)
        x_TK = torch.cat(parts, dim=-1).flatten(0, 1)[:, self._kept_K]
        if self._keeps:
            mine = x_TK[:, self.rows].clone(memory_format=torch.contiguous_format)
            self.inputs.append(mine.cpu())
        x_TK, target_TD = x_TK.float(), target_TD.float()
        self._count += len(x_TK)
        self._gram += x_TK[:, self.rows].T @ x_TK
        self._cross += target_TD[:, self._outs].T @ x_TK
        self._input_sum += x_TK.sum(0, dtype=torch.float64)
        self._target_sum += target_TD.sum(0, dtype=torch.float64)
        self._square += target_TD.double().square().sum()

    def reduce(self) -> Moments:
        """Over all windows; the same on every rank."""
        size, device = len(self._input_sum), self._groups.device
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        cross = torch.zeros(len(self._target_sum), size, dtype=torch.float64, device=device)
        gram[self.rows], cross[self._outs] = self._gram, self._cross
        for x in (gram, cross):
            dist.all_reduce(x)  # joins the rows of TP ranks, sums over DP ranks
        count = torch.tensor([float(self._count)], dtype=torch.float64, device=device)
        for x in (count, self._input_sum, self._target_sum, self._square):
            dist.all_reduce(x, group=self._groups.dp_group)
        return Moments(
            count=int(count),
            gram_KK=gram,
            cross_DK=cross,
            input_sum_K=self._input_sum,
            target_sum_D=self._target_sum,
            target_square=float(self._square),
        )


class _Repairing:
    """The pruned model's layer and hidden states, and where they are needed the dense model's."""

    def __init__(
        self,
        source: Source,
        plan: PrunePlan,
        windows_WS: Tensor,
        options: RepairOptions,
        groups: Groups,
        into: Tensors,
    ) -> None:
        self._plan, self._options, self._groups, self._into = plan, options, groups, into
        self._source, self.done = source, dict[str, Replaced]()
        # norms have the same names in both plans; projections are replaced once they were read
        self._base = RepairedSource(PrunedSource(source, without_units(plan)), into)
        dtype = options.model.dtype
        self._is_dense = options.statistics == "dense"
        if not self._is_dense:
            self._layer = Layer(self._base.config, groups, options.model)
            self._stream = Stream(self._base, windows_WS, groups, dtype)
        self._dense_at, hidden = 0, plan.tensor("D")
        self._hidden = None if hidden is None else hidden.to(groups.device)
        if self._is_dense or options.target != "own":
            self._dense_layer = Layer(source.config, groups, options.model)
            self._dense_stream = Stream(source, windows_WS, groups, dtype)

    @property
    def _needs_dense(self) -> bool:
        return self._is_dense or self._options.target != "own"

    def layer(self, layer: int, old: int) -> None:
        """Both halves of a layer, ``old`` in the source."""
        while self._needs_dense and self._dense_at < old:  # layers that the plan drops
            self._dense_layer.load(self._source, self._dense_at)
            for half in HALVES:
                self._dense_stream.advance(self._dense_layer, half)
            self._dense_at += 1
        if self._needs_dense:
            self._dense_layer.load(self._source, old)
            self._dense_at += 1
        if not self._is_dense:
            self._layer.load(self._base, layer)
        for half in HALVES:
            kept = self._plan.tensor(half.axis, old)
            if kept is not None or self._options.target != "own":
                self._fit(layer, half, self._kept_inputs(half, kept))
            elif self._is_dense:
                self._dense_stream.advance(self._dense_layer, half)
            else:
                self._stream.advance(self._layer, half)

    def _kept_inputs(self, half: Half, kept: Tensor | None) -> Tensor:
        shape = self._plan.source
        indices = torch.arange(shape.size(half.axis)) if kept is None else kept
        return expand_rows(indices, shape.rows(half.axis))

    def _fit(self, layer: int, half: Half, kept_K: Tensor) -> None:
        outputs = self._base.config.shape.hidden_size
        sums = _Sums(kept_K, outputs, self._groups, keeps=not self._is_dense)
        for at in range(len(self._dense_stream if self._is_dense else self._stream)):
            self._observe(half, at, sums)
        name = layer_name(layer, half.output)
        moments = sums.reduce()
        if not moments.is_finite:
            raise DamagedError(
                f"{self._source.path}: the second moments of what enters {name} (layers as in the "
                "pruned model) are not finite on the calibration text; the weights hold values "
                "that are not finite, or the precision is too narrow for them"
            )
        weight, bias = self._solve(name, kept_K, moments)
        if not self._is_dense:
            self._advance(sums, weight, bias)

    def _advance(self, sums: _Sums, weight_DK: Tensor, bias_D: Tensor | None) -> None:
        """Move the hidden states on with a new projection of the kept inputs."""
        for at, inputs in enumerate(sums.inputs):
            x = self._stream[at]
            mine = weight_DK[:, sums.rows].to(x.dtype)
            out_TD = inputs.to(x.device) @ mine.T
            dist.all_reduce(out_TD, group=self._groups.tp_group)
            if bias_D is not None:
                out_TD += bias_D.to(x.dtype)
            self._stream.add(at, x, out_TD.view_as(x))

    def _observe(self, half: Half, at: int, sums: _Sums) -> None:
        """Run one window through the half, and the dense one where it is needed."""
        seen: list[Tensor] = []
        if self._is_dense:
            x = self._dense_stream[at]
            target = self._dense_layer.run(half, x, seen.append)
            self._dense_stream.add(at, x, target)
            target = self._of_hidden(target)
        else:
            x = self._stream[at]
            target = self._layer.run(half, x, seen.append)
        if self._options.target != "own":
            dense = self._dense_stream[at]
            out = self._dense_layer.run(half, dense)
            self._dense_stream.add(at, dense, out)
            target = self._of_hidden(out)
            if self._options.target == "stream":
                target = self._of_hidden(dense + out).float() - x.float()
        sums.add(seen[0], target.flatten(0, 1))

    def _of_hidden(self, x: Tensor) -> Tensor:
        return x if self._hidden is None else x[..., self._hidden]

    def _solve(self, name: str, kept_K: Tensor, moments: Moments) -> tuple[Tensor, Tensor | None]:
        """Fit on the first rank, keep the result in its stored dtype, hand it to all ranks."""
        config, groups = self._base.config, self._groups
        weight_name, bias_name = f"{name}.weight", f"{name}.bias"
        has_bias = config.mlp_bias if "fc2" in name else config.proj_bias
        dtype, size = self._base.dtype(weight_name), config.shape.hidden_size
        weight = torch.zeros(size, len(kept_K), device=groups.device)
        bias, errors = torch.zeros(size, device=groups.device), torch.zeros(2, device=groups.device)

        def solve() -> None:
            if not groups.ranks.is_first:
                return
            sliced = self._base.read(weight_name)[:, kept_K].to(groups.device).double()
            old = self._base.read(bias_name).to(groups.device).double() if has_bias else None
            kept = Affine(weight_DK=sliced, bias_D=old)
            found = _stored(fit(moments, kept, self._options.damping), dtype)
            weight.copy_(found.weight_DK)
            if found.bias_D is not None:
                bias.copy_(found.bias_D)
            errors[0], errors[1] = relative_error(moments, kept), relative_error(moments, found)

        together(groups.ranks, solve)
        for x in (weight, bias, errors):
            dist.broadcast(x, 0)
        before, after = (float(f"{float(error):.4g}") for error in errors)
        parts = {weight_name: weight, **({bias_name: bias} if has_bias else {})}
        for part, x in parts.items():
            value = x.to(dtype).cpu()
            _put(self._into, part, value, groups)
            self.done[part] = Replaced(
                how="least-squares", sha256=digests(value), error_before=before, error_after=after
            )
        return weight, bias if has_bias else None


def _stored(found: Affine, dtype: torch.dtype) -> Affine:
    """Rounded as it will be stored, so that the layers above see what will be read back."""
    bias = None if found.bias_D is None else found.bias_D.to(dtype).double()
    return Affine(weight_DK=found.weight_DK.to(dtype).double(), bias_D=bias)
