"""A model run one layer at a time over calibration text: memory for one layer, whatever its depth.

A single Megatron layer lives on the device; its weights are loaded layer by layer from any
`Source`, split over the launch's tensor-parallel ranks. The hidden states of all windows wait on
the host between layers, split over the data-parallel ranks. Attention and MLP run apart, so that
what enters ``linear_proj`` and ``linear_fc2`` can be seen before the hidden states move on.

Per rank: one layer's parameters / TP, one window's activations, and on the host
``windows / DP * seq_length * hidden_size`` values.

Shape suffixes: s sequence, b batch (1), D hidden, n this rank's inputs of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.engine.failures import together
from megatron_prune.engine.forward.model import ModelOptions, build_model
from megatron_prune.engine.forward.weights import load_layer
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import DamagedError
from megatron_prune.model.axes import norm_names
from megatron_prune.model.blocks import ATTENTION, EMBEDDING
from megatron_prune.model.family import Half
from megatron_prune.model.fusion import stored_reader
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import torch_dtype
from megatron_prune.sources.source import Source

_BLOCK_TOKENS = 8192  # embedding rows read at once


class Layer:
    """One transformer layer on this rank's device, empty until `load`."""

    def __init__(self, config: ModelConfig, groups: Groups, options: ModelOptions) -> None:
        # the embedding is read by `Stream`: a vocabulary of one token keeps the module small
        alone = replace(config, shape=replace(config.shape, num_layers=1, vocab_size=1))
        self._model = build_model(alone, groups, options).to(groups.device).eval()
        decoder: Any = self._model.decoder
        self._layer: Any = decoder.layers[0]
        self._epsilon = config.norm_epsilon
        self._groups = groups
        rotary: Any = self._model.rotary_pos_emb
        self._rotary = rotary(options.seq_length)

    def load(self, source: Source, layer: int) -> None:
        """Take over a layer's weights."""
        load_layer(self._layer, source, layer, self._groups)

    @torch.no_grad()
    def normed(self, half: Half, x_sbD: Tensor) -> Tensor:
        """What the readers of a half's norm read, [s, b, D]."""
        reader = self._layer.get_submodule(stored_reader(half))
        if hasattr(reader, "layer_norm_weight"):  # Transformer Engine's has the norm in it
            weight = reader.layer_norm_weight
            return F.rms_norm(x_sbD, weight.shape, weight, self._epsilon)
        normed: Tensor = getattr(self._layer, half.norm)(x_sbD)
        return normed

    @torch.no_grad()
    def run(
        self, half: Half, x_sbD: Tensor, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """What a half adds to the stream, bias and all.

        Args:
            x_sbD: on the device.
            watch: is shown the projection's input [s, b, n].

        Returns:
            [s, b, D]
        """
        layer = self._layer
        # Transformer Engine's spec has the norm inside the linear that follows, and none here
        normed = getattr(layer, half.norm)(x_sbD)
        hooks = []
        if watch is not None:
            show = watch
            hooks.append(
                layer.get_submodule(half.output).register_forward_pre_hook(
                    lambda _, args: show(args[0])
                )
            )
        try:
            if half is ATTENTION:
                out, bias = layer.self_attention(
                    normed, attention_mask=None, rotary_pos_emb=self._rotary
                )
            else:
                out, bias = layer.mlp(normed)
        finally:
            for hook in hooks:
                hook.remove()
        found: Tensor = out if bias is None else out + bias
        return found


class Stream:
    """The hidden states of this rank's windows, between two halves.

    Args:
        windows_WS: [W, S] int64, all windows, the same on every rank; data-parallel rank d takes
            every DP-th from d on.
    """

    def __init__(self, source: Source, windows_WS: Tensor, groups: Groups, dtype: str) -> None:
        self._device = groups.device
        mine = windows_WS[groups.dp_rank :: groups.data_parallel]
        embedded = together(groups.ranks, lambda: _embed(source, mine, torch_dtype(dtype)))
        self._states = list(embedded)

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[Tensor]:
        """Each window's [S, 1, D], on the device."""
        for at in range(len(self)):
            yield self[at]

    def __getitem__(self, at: int) -> Tensor:
        return self._states[at][:, None].to(self._device)

    def add(self, at: int, x_sbD: Tensor, out_sbD: Tensor) -> None:
        """Move a window on: what it was and what a half adds."""
        self._states[at] = (x_sbD + out_sbD)[:, 0].to("cpu")

    def advance(self, layer: Layer, half: Half) -> None:
        """Move all windows through a half."""
        for at, x in enumerate(self):
            self.add(at, x, layer.run(half, x))


def _embed(source: Source, windows_wS: Tensor, dtype: torch.dtype) -> Tensor:
    """[w, S] ids -> [w, S, D]; reads the embedding once, in blocks of rows."""
    shape = source.config.shape
    out = torch.empty(*windows_wS.shape, shape.hidden_size, dtype=dtype)
    for start in range(0, shape.vocab_size, _BLOCK_TOKENS):
        stop = min(start + _BLOCK_TOKENS, shape.vocab_size)
        here = (windows_wS >= start) & (windows_wS < stop)
        if bool(here.any()):
            rows = source.read(EMBEDDING.name, start, stop)
            out[here] = rows[windows_wS[here] - start].to(dtype)
    return out


def norm_energy(
    source: Source,
    windows_WS: Tensor,
    groups: Groups,
    options: ModelOptions,
    progress: Callable[[int], object] = lambda layers: None,
) -> Tensor:
    """How each norm's input is spread over the hidden channels.

    ``e_c`` = mean over tokens of ``(x_c / rms(x))^2``. One pass through the model.

    Args:
        progress: told of each layer done.

    Returns:
        [N, D] float32 on the host, the same on every rank, in the order of `axes.norm_names`.
        Every row is 1 on average.

    Raises:
        DamagedError: the hidden states are not finite; names the norm.
    """

    def squares(x_TD: Tensor) -> Tensor:
        return x_TD.square().sum(0, dtype=torch.float64)

    means = _norm_means(squares, source, windows_WS, groups, options, progress)
    return torch.stack([energy_D for _, energy_D in means]).float().cpu()


def norm_moment(
    source: Source,
    windows_WS: Tensor,
    groups: Groups,
    options: ModelOptions,
    progress: Callable[[int], object] = lambda layers: None,
) -> Tensor:
    """Second moment of the normalised residual stream, every norm's input counted alike.

    Mean over norms and tokens of ``x x^T / rms(x)^2``. One pass through the model, and
    ``D^2 * 24`` bytes on the device.

    Returns:
        [D, D] float64 on the host, the same on every rank; its trace is D.

    Raises:
        DamagedError: as `norm_energy`.
    """

    def products(x_TD: Tensor) -> Tensor:
        return (x_TD.T @ x_TD).double()

    size = source.config.shape.hidden_size
    total = torch.zeros(size, size, dtype=torch.float64, device=groups.device)
    for _, moment in _norm_means(products, source, windows_WS, groups, options, progress):
        total += moment
    return total.cpu() / len(norm_names(source.config))


def _norm_means(
    measure: Callable[[Tensor], Tensor],
    source: Source,
    windows_WS: Tensor,
    groups: Groups,
    options: ModelOptions,
    progress: Callable[[int], object],
) -> Iterator[tuple[str, Tensor]]:
    """Each norm in the forward pass's order, with its input, normalised, measured, per token.

    Args:
        measure: [T, D] float32 of one window -> a sum over its tokens, float64.
    """

    def mean(norm: str) -> tuple[str, Tensor]:
        total = measure(torch.zeros(1, source.config.shape.hidden_size, device=groups.device))
        for x in stream:  # none where there are more ranks than windows
            total += measure(normalised(x, epsilon))
        dist.all_reduce(total, group=groups.dp_group)
        if not bool(total.isfinite().all()):
            raise DamagedError(
                f"{source.path}: the input of {source.stored_name(norm)} is not finite on the "
                "calibration text; its weights hold values that are not finite, or the precision "
                "is too narrow for it"
            )
        return norm, total / windows_WS.numel()

    epsilon = source.config.norm_epsilon
    layer = Layer(source.config, groups, options)
    stream = Stream(source, windows_WS, groups, options.dtype)
    norms = iter(norm_names(source.config))
    for number in range(source.config.shape.num_layers):
        layer.load(source, number)
        for half in source.config.family.halves:
            yield mean(next(norms))
            stream.advance(layer, half)
        progress(1)
    yield mean(next(norms))


def normalised(x_sbD: Tensor, epsilon: float) -> Tensor:
    """A hidden state as RMSNorm sees it, before its weight: [T, D] float32."""
    x_TD = x_sbD[:, 0].float()
    return x_TD * (x_TD.square().mean(-1, keepdim=True) + epsilon).rsqrt()
