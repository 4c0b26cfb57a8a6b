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
Readers add two such problems a layer, hidden channels kept against all of them.

Shape suffixes: s sequence, b batch (1), T tokens, D hidden, K kept inputs, N all inputs, n this
rank's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.engine.failures import on_first_rank, together
from megatron_prune.engine.forward.model import ModelOptions
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.observe.inputs import gathered
from megatron_prune.engine.observe.layerwise import Layer, Stream, normalised
from megatron_prune.engine.observe.moments import MomentSums
from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import layer_name, names, norm_before, norm_names, split_layer
from megatron_prune.model.family import Half
from megatron_prune.model.tensors import expand_rows
from megatron_prune.planning.fit import Fit, with_all_channels, without_units
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.solve.least_squares import Affine, Moments, fit, norm_ratio, relative_error
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.repair_record import Replaced, digests
from megatron_prune.sources.replaced import Mix, MixedSource, RepairedSource, Tensors
from megatron_prune.sources.source import Source


def rescale_norms(
    source: Source,
    plan: PrunePlan,
    energy: Tensor,
    groups: Groups,
    into: Tensors,
) -> dict[str, Replaced]:
    """Multiply each norm's weight by `least_squares.norm_ratio`; returns what was replaced.

    Args:
        energy: [N, D] of the norms of ``source``, as `layerwise.norm_energy` gives it.
    """
    pruned, hidden = PrunedSource(source, plan), plan.tensor("D")
    energy_of, (*norms, final) = (
        dict(zip(norm_names(source.config), energy)),
        norm_names(pruned.config),
    )
    done = {}
    for name in (final, *norms):
        layer, rest = split_layer(name)
        old = name if layer is None else layer_name(plan.layers[layer], rest)
        ratio = norm_ratio(energy_of[old], hidden)
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
    how: Fit,
    model: ModelOptions,
    groups: Groups,
    into: Tensors,
    rescaled: Mapping[str, Replaced] = MappingProxyType({}),
    progress: Callable[[int], object] = lambda layers: None,
) -> dict[str, Replaced]:
    """Fit every ``linear_proj`` and ``linear_fc2`` that lost inputs; returns what was replaced.

    With a target other than ``own`` those that lost none are fitted too; with ``readers`` also
    ``linear_qkv`` and ``linear_fc1``, and the norms before them.

    Args:
        windows_WS: [W, S] int64 of the source's vocabulary, the same on every rank.
        model: of the calibration's forward passes.
        into: holds the rescaled norms; is given the fitted weights.
        rescaled: what `rescale_norms` returned.
        progress: told of each layer done.

    Raises:
        DamagedError: moments or fitted weights that are not finite; names the tensor.
        ConfigError: see `least_squares.fit`.
        DistributedError: the first rank met one of these.
    """
    run = _Repairing(source, plan, windows_WS, how, model, groups, into, rescaled)
    for layer in range(plan.target.num_layers):
        run.layer(layer)
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


class _Repairing:
    """The pruned model's layer and hidden states, and where they are needed the dense model's."""

    def __init__(
        self,
        source: Source,
        plan: PrunePlan,
        windows_WS: Tensor,
        how: Fit,
        model: ModelOptions,
        groups: Groups,
        into: Tensors,
        rescaled: Mapping[str, Replaced],
    ) -> None:
        self._plan, self._how, self._groups, self._into = plan, how, groups, into
        self._source, self._rescaled, self.done = source, rescaled, dict[str, Replaced]()
        self._halves = source.config.family.halves
        # norms have the same names in both plans; projections are replaced once they were read
        self._whole, self._pruned = (
            PrunedSource(source, without_units(plan)),
            PrunedSource(source, plan),
        )
        self._base = RepairedSource(self._whole, into)
        if how.readers:  # the same two with all hidden channels
            self._wide_whole = PrunedSource(source, with_all_channels(without_units(plan)))
            self._wide_pruned = PrunedSource(source, with_all_channels(plan))
        dtype = model.dtype
        if how.statistics != "dense":
            self._layer = Layer(self._base.config, groups, model)
            self._stream = Stream(self._base, windows_WS, groups, dtype)
        self._dense_at, hidden = 0, plan.tensor("D")
        self._hidden = None if hidden is None else hidden.to(groups.device)
        if how.needs_dense:
            self._dense_layer = Layer(source.config, groups, model)
            self._dense_stream = Stream(source, windows_WS, groups, dtype)

    def layer(self, layer: int) -> None:
        """Both halves of a layer of the pruned model."""
        how, old = self._how, self._plan.layers[layer]
        if how.needs_dense:
            self._advance_dense_to(old)
            self._dense_layer.load(self._source, old)
            self._dense_at += 1
        if how.statistics != "dense":
            self._layer.load(self._base, layer)
        for half in self._halves:
            if how.readers:
                self._fit_readers(layer, half)
            if how.moves_dense_first:
                self._dense_stream.advance(self._dense_layer, half)
                if (
                    half is self._halves[-1]
                ):  # the target makes good for dropped layers that come next
                    above = (*self._plan.layers, self._plan.source.num_layers)[layer + 1]
                    self._advance_dense_to(above)
            kept = self._plan.tensor(half.axis, old)
            if kept is not None or how.target != "own":
                self._fit(layer, half, self._kept_inputs(half, kept))
            elif how.statistics == "dense":
                self._dense_stream.advance(self._dense_layer, half)
            else:
                self._stream.advance(self._layer, half)

    def _advance_dense_to(self, old: int) -> None:
        """Move the dense model's hidden states through layers that the plan drops."""
        while self._dense_at < old:
            self._dense_layer.load(self._source, self._dense_at)
            for half in self._halves:
                self._dense_stream.advance(self._dense_layer, half)
            self._dense_at += 1

    def _kept_inputs(self, half: Half, kept: Tensor | None) -> Tensor:
        shape = self._plan.source
        indices = torch.arange(shape.size(half.axis)) if kept is None else kept
        return expand_rows(indices, shape.rows(half.axis))

    def _fit_readers(self, layer: int, half: Half) -> None:
        """Fit what reads a norm: the dense model's normalised state from the pruned one's.

        All readers of a norm share one map ``M [D, D']``, the best estimate of the dense state:
        with the norm's weight ``g`` they take ``W diag(g) M`` (`repair.Mix`).
        """
        norm = layer_name(layer, f"{half.norm}.weight")
        dense_size, epsilon = self._source.config.shape.hidden_size, self._base.config.norm_epsilon
        sums = MomentSums(self._base.config.shape.hidden_size, dense_size, self._groups)
        for x, dense in zip(self._stream, self._dense_stream):
            sums.add(normalised(x, epsilon), normalised(dense, epsilon))
        moments = self._finite(sums, norm)
        mixed = torch.zeros(dense_size, len(moments.gram_KK), device=self._groups.device)
        errors = torch.zeros(2, device=self._groups.device)

        def solve() -> None:
            ratio = self._rescaled[norm].ratio if norm in self._rescaled else None
            identity = torch.eye(dense_size, dtype=torch.float64, device=mixed.device)
            sliced = identity if self._hidden is None else identity[:, self._hidden]
            before = Affine(weight_DK=sliced * (ratio or 1.0), bias_D=None)
            found = fit(moments, before, self._how.readers_damping)
            mixed.copy_(found.weight_DK)
            errors[0], errors[1] = relative_error(moments, before), relative_error(moments, found)

        self._on_first_rank(solve, mixed, errors)
        mix = Mix.of(mixed, self._wide_whole.read(norm))
        self._replace_readers(norm, mix, errors)
        self._layer.load(MixedSource(self._whole, self._wide_whole, {norm: mix}), layer)

    def _replace_readers(self, norm: str, mix: Mix, errors: Tensor) -> None:
        """Write the readers of a norm as the plan leaves them, and the norm itself."""
        final = MixedSource(self._pruned, self._wide_pruned, {norm: mix})
        before, after = _rounded(errors)

        def write(name: str) -> Replaced:
            value = final.read(name)
            if not bool(value.isfinite().all()):
                raise DamagedError(
                    f"{self._source.path}: {name}, fitted, is not finite in {value.dtype}"
                )
            self._into.put(name, value)
            if name == norm:
                return Replaced(how="norm-of-readers", sha256=digests(value))
            return Replaced(
                how="readers", sha256=digests(value), error_before=before, error_after=after
            )

        for name in (norm, *(n for n in names(final.config) if norm_before(n) == norm)):
            self.done[name] = on_first_rank(self._groups.ranks, partial(write, name))
            self._into.put(name, torch.empty(0), here=False)

    def _on_first_rank(self, work: Callable[[], object], *found: Tensor) -> None:
        """Fill some tensors on the first rank, for all."""
        together(self._groups.ranks, lambda: work() if self._groups.ranks.is_first else None)
        for x in found:
            dist.broadcast(x, 0)

    def _fit(self, layer: int, half: Half, kept_K: Tensor) -> None:
        sums = MomentSums(len(kept_K), self._base.config.shape.hidden_size, self._groups)
        name, kept_K = layer_name(layer, half.output), kept_K.to(self._groups.device)
        inputs: list[Tensor] = []  # this rank's share, on the host
        is_dense = self._how.statistics == "dense"
        for at in range(len(self._dense_stream if is_dense else self._stream)):
            mine, target = self._observe(half, at)
            x_TK = gathered(mine, self._groups)[:, kept_K]
            sums.add(x_TK, target.flatten(0, 1))
            if not is_dense:
                share = x_TK[:, sums.rows].clone(memory_format=torch.contiguous_format)
                inputs.append(share.cpu())
        weight, bias = self._solve(name, kept_K.cpu(), self._finite(sums, f"what enters {name}"))
        if not is_dense:
            self._advance(inputs, sums.rows, weight, bias)

    def _finite(self, sums: MomentSums, what: str) -> Moments:
        moments = sums.reduce()
        if not moments.is_finite:
            raise DamagedError(
                f"{self._source.path}: the second moments of {what} (layers as in the "
                "pruned model) are not finite on the calibration text; the weights hold values "
                "that are not finite, or the precision is too narrow for them"
            )
        return moments

    def _advance(
        self, inputs: list[Tensor], rows: slice, weight_DK: Tensor, bias_D: Tensor | None
    ) -> None:
        """Move the hidden states on with a new projection of the kept inputs."""
        for at, share in enumerate(inputs):
            x = self._stream[at]
            out_TD = share.to(x.device) @ weight_DK[:, rows].to(x.dtype).T
            dist.all_reduce(out_TD, group=self._groups.tp_group)
            if bias_D is not None:
                out_TD += bias_D.to(x.dtype)
            self._stream.add(at, x, out_TD.view_as(x))

    def _observe(self, half: Half, at: int) -> tuple[Tensor, Tensor]:
        """Run one window through the half, and the dense one with it.

        Returns:
            What enters the projection on this rank [s, b, n], what should leave it [s, b, D].
        """
        seen: list[Tensor] = []
        target = self._how.target
        if self._how.statistics == "dense":
            dense = self._dense_stream[at]
            wanted = self._dense_layer.run(half, dense, seen.append)
            self._dense_stream.add(at, dense, wanted)
            return seen[0], self._of_hidden(wanted)
        x = self._stream[at]
        wanted = self._layer.run(half, x, seen.append)
        if target == "dense":
            dense = self._dense_stream[at]
            out = self._dense_layer.run(half, dense)
            self._dense_stream.add(at, dense, out)
            wanted = self._of_hidden(out)
        if target == "stream":
            wanted = self._of_hidden(self._dense_stream[at]).float() - x.float()
        return seen[0], wanted

    def _of_hidden(self, x: Tensor) -> Tensor:
        return x if self._hidden is None else x[..., self._hidden]

    def _solve(self, name: str, kept_K: Tensor, moments: Moments) -> tuple[Tensor, Tensor | None]:
        """Fit on the first rank, keep the result in its stored dtype, hand it to all ranks."""
        config, groups = self._base.config, self._groups
        weight_name, bias_name = f"{name}.weight", f"{name}.bias"
        has_bias = bias_name in names(config)
        dtype, size = self._base.dtype(weight_name), config.shape.hidden_size
        weight = torch.zeros(size, len(kept_K), device=groups.device)
        bias, errors = torch.zeros(size, device=groups.device), torch.zeros(2, device=groups.device)

        def solve() -> None:
            sliced = self._base.read(weight_name)[:, kept_K].to(groups.device).double()
            old = self._base.read(bias_name).to(groups.device).double() if has_bias else None
            kept = Affine(weight_DK=sliced, bias_D=old)
            found = _stored(fit(moments, kept, self._how.damping), dtype)
            weight.copy_(found.weight_DK)
            if found.bias_D is not None:
                bias.copy_(found.bias_D)
            errors[0], errors[1] = relative_error(moments, kept), relative_error(moments, found)

        self._on_first_rank(solve, weight, bias, errors)
        before, after = _rounded(errors)
        parts = {weight_name: weight, **({bias_name: bias} if has_bias else {})}
        for part, x in parts.items():
            value = x.to(dtype).cpu()
            _put(self._into, part, value, groups)
            self.done[part] = Replaced(
                how="least-squares", sha256=digests(value), error_before=before, error_after=after
            )
        return weight, bias if has_bias else None


def _rounded(errors: Tensor) -> list[float]:
    return [float(f"{float(error):.4g}") for error in errors]


def _stored(found: Affine, dtype: torch.dtype) -> Affine:
    """Rounded as it will be stored, so that the layers above see what will be read back."""
    bias = None if found.bias_D is None else found.bias_D.to(dtype).double()
    return Affine(weight_DK=found.weight_DK.to(dtype).double(), bias_D=bias)
