"""The loss of the model without a layer, for every layer: on the shards, with nothing reloaded.

A removed layer hands its input on; the model stays as it is. What comes before the removed layer is
the same for all of them, so it runs once and every layer's input is kept: a round costs half as
many forward passes as there are layers. Memory: the inputs of this stage's layers for all samples
of this rank, W / DP x S x D x L / PP values. Greedy removal of n layers costs n rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.forward.windows import window_losses
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import DamagedError

LayerInputs = dict[int, list[Tensor]]
"""Number of a layer of this stage -> its input in every call, [s, b, D]."""


def _layers(model: LanguageModel, groups: Groups, num_layers: int) -> Iterator[tuple[int, Any]]:
    first = groups.grid.stage_layers(num_layers, groups.pp_rank).start
    return enumerate(model.decoder.layers, first)


@contextmanager
def _replaced(layers: Sequence[tuple[Any, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Layers that do something else to the hidden states for a while."""
    with ExitStack() as stack:
        for layer, does in layers:

            def forward(
                hidden_states: Tensor,
                *_: Any,
                does: Callable[[Tensor], Tensor] = does,
                **__: Any,
            ) -> tuple[Tensor, None]:
                return does(hidden_states), None

            layer.forward = forward
            stack.callback(layer.__dict__.pop, "forward")
        yield


def _unchanged(x: Tensor) -> Tensor:
    return x


def _next_of(calls: Iterator[Tensor], _: Tensor) -> Tensor:
    return next(calls)


@contextmanager
def _recording(model: LanguageModel, groups: Groups, num_layers: int) -> Iterator[LayerInputs]:
    inputs: LayerInputs = {}
    with ExitStack() as stack:
        for number, layer in _layers(model, groups, num_layers):
            calls = inputs.setdefault(number, [])
            handle = layer.register_forward_pre_hook(
                lambda _, args, kwargs, calls=calls: calls.append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            stack.callback(handle.remove)
        yield inputs


@contextmanager
def _without(
    model: LanguageModel,
    removed: int,
    gone: Collection[int],
    inputs: LayerInputs,
    groups: Groups,
    num_layers: int,
) -> Iterator[None]:
    """The model from the removed layer on; what comes before is not run again."""
    layers: list[tuple[Any, Callable[[Tensor], Tensor]]] = []
    for number, layer in _layers(model, groups, num_layers):
        if number == removed:
            calls = iter(inputs[number])
            layers.append((layer, partial(_next_of, calls)))
        elif number < removed or number in gone:
            layers.append((layer, _unchanged))
    with _replaced(layers):
        yield


def losses_without(
    model: LanguageModel,
    num_layers: int,
    windows_WS: Tensor,
    groups: Groups,
    *,
    gone: Sequence[int] = (),
    micro_batch_size: int = 1,
    progress: Callable[[int], object] = lambda windows: None,
) -> Tensor:
    """[L] float64: mean loss without each layer and those ``gone`` before; inf for these.

    Raises:
        DamagedError: a loss is not finite; names the layer.
    """
    losses = torch.full((num_layers,), torch.inf, dtype=torch.float64)
    already = [(x, _unchanged) for n, x in _layers(model, groups, num_layers) if n in gone]
    with _recording(model, groups, num_layers) as inputs, _replaced(already):
        window_losses(model, windows_WS, groups, micro_batch_size=micro_batch_size)
    for layer in range(num_layers):
        if layer in gone:
            continue
        with _without(model, layer, gone, inputs, groups, num_layers):
            found = window_losses(
                model, windows_WS, groups, micro_batch_size=micro_batch_size, progress=progress
            )
        losses[layer] = found.mean()
        if not bool(losses[layer].isfinite()):
            raise DamagedError(
                f"the loss without layer {layer} is {float(losses[layer])}: --fp16 is too narrow "
                "for this model, or a weight of it is not finite"
            )
    return losses


def greedy_removal(
    model: LanguageModel,
    num_layers: int,
    count: int,
    windows_WS: Tensor,
    groups: Groups,
    *,
    micro_batch_size: int = 1,
    progress: Callable[[int], object] = lambda windows: None,
) -> tuple[list[int], Tensor]:
    """Remove ``count`` layers one by one, each time the one whose loss is least.

    Returns:
        The layers in the order in which they went, and [L] the losses of the last round.
    """
    gone: list[int] = []
    losses = torch.zeros(num_layers, dtype=torch.float64)
    for _ in range(count):
        losses = losses_without(
            model,
            num_layers,
            windows_WS,
            groups,
            gone=gone,
            micro_batch_size=micro_batch_size,
            progress=progress,
        )
        gone.append(int(losses.argmin()))
    return gone, losses
