"""Gates on a GPTModel, hung from outside: its modules stay as they are.

Of a hidden channel: the embedding's output, the output of every norm and of both halves of a layer
are multiplied by its gate, and norms take the mean square of the channels whose gate is open. Of a
layer: the output of both halves. Of a head, a query group, an FFN channel: what enters
``linear_proj`` and ``linear_fc2``. So the model computes what the pruned one computes with gates
folded into it once (`shearing.folding`), which LLM-Shearing's does not: it leaves the embedding
alone and folds into the final norm as well as into the output layer.

A microbatch's gates are one leaf [n] on the device, whose gradient every use adds to in float32,
whatever the model's dtype. It costs n floats a microbatch, and six products of activations a layer.

Shape suffixes: s sequence, b batch, D hidden, I inputs of a projection on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.engine.forward.layers import RMSNorm
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import ConfigError
from megatron_prune.model.family import Half
from megatron_prune.model.grid import part_range
from megatron_prune.model.shape import ModelConfig


class _Gated(torch.autograd.Function):
    """[s, b, n] times [n] float32, whose gradient is summed in float32."""

    @staticmethod
    def forward(ctx: Any, x_sbn: Tensor, gate_n: Tensor) -> Tensor:
        ctx.save_for_backward(x_sbn, gate_n)
        return x_sbn * gate_n.to(x_sbn.dtype)

    @staticmethod
    def backward(ctx: Any, grad_sbn: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_sbn, gate_n = ctx.saved_tensors
        need_x, need_gate = ctx.needs_input_grad
        grad_x = grad_sbn * gate_n.to(grad_sbn.dtype) if need_x else None
        grad_gate = None
        if need_gate:
            grad_gate = (grad_sbn.float() * x_sbn.float()).flatten(0, -2).sum(0)
        return grad_x, grad_gate


@dataclass(frozen=True, kw_only=True)
class OpenGates:
    """The gates of one forward pass, by axis letter [rows, size] float32 on the device; axes
    without gates are missing.

    Attributes:
        open_hidden: hidden channels whose gate is not 0.
    """

    values: Mapping[str, Tensor]
    open_hidden: int

    @classmethod
    def of(
        cls, values: Mapping[str, Tensor], like: Mapping[str, Tensor] | None = None
    ) -> OpenGates:
        """``like``: the same gates on the host, where counting waits for nothing."""
        hidden = (values if like is None else like).get("D")
        count = 0 if hidden is None else int(hidden.count_nonzero())
        return cls(values=values, open_hidden=count)


class GatedModel:
    """The hooks on one rank's part of a model.

    Args:
        model: before it is wrapped.
        now: the gates of the forward or backward pass under way; None: no gates.

    Raises:
        ConfigError: a norm that cannot be gated.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: ModelConfig,
        groups: Groups,
        now: Callable[[], OpenGates | None],
    ) -> None:
        self._config, self._groups, self._now = config, groups, now
        first = groups.grid.stage_layers(config.shape.num_layers, groups.pp_rank).start
        if groups.is_first_stage:
            model.embedding.register_forward_hook(lambda _, __, out: self._hidden(out))
        for number, layer in enumerate(model.decoder.layers, first):
            for half in config.family.halves:
                self._gate_norm(layer.get_submodule(half.norm))
                projection = layer.get_submodule(half.output)
                projection.register_forward_pre_hook(self._before(number, half))
                projection.register_forward_hook(self._after(number))
        if groups.is_last_stage:
            self._gate_norm(model.decoder.final_layernorm)

    def _hidden(self, x_sbD: Tensor) -> Tensor:
        now = self._now()
        if now is None or "D" not in now.values:
            return x_sbD
        out: Tensor = _Gated.apply(x_sbD, now.values["D"][0])
        return out

    def _gate_norm(self, norm: torch.nn.Module) -> None:
        if not isinstance(norm, RMSNorm):
            raise ConfigError(
                f"gates of hidden channels: {type(norm).__name__} has no place for them; wanted "
                "the RMSNorm of --transformer-impl local"
            )
        plain = norm.forward

        def forward(x_sbD: Tensor) -> Tensor:
            now = self._now()
            if now is None or "D" not in now.values:
                return plain(x_sbD)
            # over the open channels alone: shut ones are 0, so only the count differs
            share = max(now.open_hidden, 1) / x_sbD.shape[-1]
            weight = norm.weight.float() * (now.values["D"][0] * math.sqrt(share))
            return F.rms_norm(x_sbD, weight.shape, weight.to(x_sbD.dtype), norm.eps * share)

        norm.forward = forward  # type: ignore[method-assign]

    def _before(self, layer: int, half: Half) -> Callable[..., tuple[Tensor, ...] | None]:
        """The inputs of a projection, times the gates of their heads or channels."""

        def hook(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            now = self._now()
            gate = None if now is None else self._inputs(now.values, layer, half)
            return None if gate is None else (_Gated.apply(args[0], gate), *args[1:])

        return hook

    def _inputs(self, values: Mapping[str, Tensor], layer: int, half: Half) -> Tensor | None:
        """[I] gates of this rank's inputs of a projection."""
        shape, ranks = self._config.shape, self._groups.grid.tensor_parallel
        found = []
        for letter, each in ((half.axis, 1), ("K", shape.heads_per_group)):
            if letter in values and (letter != "K" or half.axis == "Q"):
                start, stop = part_range(shape.size(letter), self._groups.tp_rank, ranks)
                rows = each * shape.rows(half.axis)
                found.append(values[letter][layer, start:stop].repeat_interleave(rows))
        return None if not found else found[0] if len(found) == 1 else found[0] * found[1]

    def _after(self, layer: int) -> Callable[..., Any]:
        """The output of a half, and the bias that is added to it later."""

        def hook(_: Any, __: Any, out: tuple[Tensor, Tensor | None]) -> Any:
            now = self._now()
            gate = None if now is None else self._outputs(now.values, layer)
            if gate is None:
                return None
            x_sbD, bias_D = out
            bias_D = None if bias_D is None else (bias_D.float() * gate).to(bias_D.dtype)
            return _Gated.apply(x_sbD, gate), bias_D

        return hook

    def _outputs(self, values: Mapping[str, Tensor], layer: int) -> Tensor | None:
        """[D] gates of what a layer adds to the hidden state."""
        hidden, layers = values.get("D"), values.get("L")
        if layers is None:
            return None if hidden is None else hidden[0]
        one = layers[0, layer]
        return one.expand(self._config.shape.hidden_size) if hidden is None else hidden[0] * one
