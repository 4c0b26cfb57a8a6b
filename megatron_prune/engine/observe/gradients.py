"""|weight x gradient| of every unit, sample by sample, on the shards.

One backward pass a sample: the criteria add up sizes, so gradients of different samples must not
cancel. Memory: the gradients (the model's size in its dtype) and the activations of one sample; no
optimizer. Pipeline stages work one after the other here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prune.criteria.observed import UnitSums
from megatron_prune.engine.failures import together
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.forward.weights import canonical_name
from megatron_prune.engine.groups import Groups
from megatron_prune.errors import DamagedError
from megatron_prune.model import axes
from megatron_prune.model.blocks import OUTPUT
from megatron_prune.model.fusion import parts_of, split
from megatron_prune.model.grid import part_range
from megatron_prune.model.shape import ModelConfig


def _parts(
    name: str, value: Tensor, config: ModelConfig, groups: Groups
) -> Iterator[tuple[str, Tensor, int]]:
    """A parameter taken apart: canonical name, this rank's values, first index of its axis."""
    layer, rest = axes.split_layer(name)
    shape, ranks = config.shape, groups.grid.tensor_parallel
    for part in parts_of(rest, config):
        letters = axes.axes_of(part)
        dim = axes.split_dim(letters)
        axis = "V" if dim is None else letters[dim]
        first = 0 if axis == "V" else part_range(shape.size(axis), groups.tp_rank, ranks)[0]
        yield axes.in_layer(layer, part), split(value, part, shape), first


def _join_gradients(model: LanguageModel, groups: Groups) -> None:
    """Sum what ranks hold parts of: norms under sequence parallelism, those of queries and keys of
    a rank's heads always, tied copies under PP."""
    for name, parameter in model.named_parameters():
        of_heads = name.endswith(("q_layernorm.weight", "k_layernorm.weight"))
        of_tokens = model.config.sequence_parallel and getattr(
            parameter, "sequence_parallel", False
        )
        if (of_heads or of_tokens) and parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=groups.tp_group)
    tied = model.share_embeddings_and_output_weights
    if (
        tied
        and groups.grid.pipeline_parallel > 1
        and (groups.is_first_stage or groups.is_last_stage)
    ):
        weight = model.shared_embedding_or_output_weight()
        dist.all_reduce(weight.grad, group=parallel_state.get_embedding_group())


def unit_gradients(
    model: LanguageModel,
    config: ModelConfig,
    windows_WS: Tensor,
    groups: Groups,
    *,
    progress: Callable[[int], object] = lambda windows: None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums over the samples and over the weights of every unit.

    Args:
        windows_WS: [W, S] int64 token ids, the same on all ranks.
        progress: called on all ranks with the number of windows just done.

    Returns:
        Of |weight x gradient|, and of (weight x gradient)^2; each axis letter -> float64, whole
        axes, the same on every rank.

    Raises:
        DamagedError: a gradient is not finite; names the parameter.
    """
    first, second, bad = UnitSums(config.shape), UnitSums(config.shape), list[str]()
    model.train()
    mine = range(groups.dp_rank, len(windows_WS), groups.data_parallel)
    for number in mine:
        _backward(model, windows_WS[number][None].to(groups.device))
        _join_gradients(model, groups)
        _add(model, config, groups, first, second, bad)
        model.zero_grad(set_to_none=True)
        progress(min(groups.data_parallel, len(windows_WS) - number + groups.dp_rank))
    model.eval()
    together(groups.ranks, lambda: _check(bad))  # only now: the others wait in their collectives
    return _reduced(first, groups), _reduced(second, groups)


def _backward(model: LanguageModel, window_1S: Tensor) -> None:
    length = window_1S.shape[1]

    def forward(batches: Iterator[Tensor], model: LanguageModel) -> tuple[Tensor, object]:
        tokens_1S = next(batches)
        out = model(tokens_1S, None, None, labels=tokens_1S.roll(-1, dims=1))
        return out, lambda losses_1S: (losses_1S[:, :-1].mean(), {})

    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter([window_1S]),
        model=model,
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=False,
    )


def _add(
    model: LanguageModel,
    config: ModelConfig,
    groups: Groups,
    first: UnitSums,
    second: UnitSums,
    bad: list[str],
) -> None:
    for name, parameter in model.named_parameters():
        whole = canonical_name(name, config, groups)
        _, rest = axes.split_layer(whole)
        copy = config.tied and rest == OUTPUT.name  # the last stage's; the first has counted it
        cut = axes.split_dim(axes.axes_of(parts_of(rest, config)[0]))
        if parameter.grad is None or copy or (cut is None and groups.tp_rank):
            continue
        change = parameter.detach().float() * parameter.grad.float()
        if not bool(torch.isfinite(change).all()):
            bad.append(whole)
        for part, values, start in _parts(whole, change, config, groups):
            first.add(part, values.abs(), start)
            second.add(part, values.square(), start)


def _check(bad: list[str]) -> None:
    if bad:
        raise DamagedError(
            f"the gradient of {bad[0]} is not finite on the calibration text; a weight or an "
            "activation of the model is too large"
        )


def _reduced(sums: UnitSums, groups: Groups) -> dict[str, Tensor]:
    for x in sums.sums.values():
        moved = x.to(groups.device)
        dist.all_reduce(moved)
        x.copy_(moved)
    return sums.units()
