"""Weights that are zero stay zero: ``--keep-zeros``.

The mask of a linear in the layers is its weight, as precise as the optimizer holds it (the float32
master weight; of the distributed optimizer this rank's part): nothing is stored, and a run that
continues, at whatever layout, has the mask of the run that was saved. Before every step the
gradient and the first moment of weights that are zero become zero. AdamW then leaves such a weight
at w (1 - lr decay) - lr m / (sqrt(v) + eps) = 0 exactly, for w = m = 0 and eps > 0, and so its copy
in 16 bits. The gradient norm, and what is clipped by it, is that of the weights that move.

A weight that was not zero and lands on zero exactly, in float32, stays there, in a run that goes on
as in one that is resumed. That takes a step of the weight's own size to its last bit.

It costs a mask of one matrix at a time, one byte a weight, and no memory besides; three passes over
weights, gradients and moments a step. Nothing is communicated.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.train.optimizer import main_weights
from megatron_prune.errors import ConfigError
from megatron_prune.model.axes import axes_of, names, split_layer, tensor_shape
from megatron_prune.model.lora import TARGETS
from megatron_prune.model.shape import ModelConfig
from megatron_prune.sources.source import Source

_BY_CHANCE = 0.01  # SmolLM2-135M out of 4 bits a weight has 0.03% zeros


def _matrices(config: ModelConfig) -> list[str]:
    """Canonical names of what is masked: the weights of the layers' linears."""
    found = (name for name in names(config) if split_layer(name)[0] is not None)
    return [name for name in found if len(axes_of(name)) == 2]


def check_zeros(source: Source) -> None:
    """Refuse a model that has no zero to keep.

    Reads matrices until there is one: the first of a sparse model, all of a dense one.

    Raises:
        ConfigError: with the number of weights none of which is zero.
    """
    listed = _matrices(source.config)
    if any(bool((source.read(name) == 0).any()) for name in listed):
        return
    count = sum(prod(tensor_shape(name, source.config.shape)) for name in listed)
    raise ConfigError(
        f"--keep-zeros: {source.path} is dense, 0 of the {count:,} weights of its layers' matrices "
        "are zero; start from a sparse model, or leave the flag out"
    )


class KeptZeros:
    """The weights of a model whose zeros are kept, this rank's part of them."""

    def __init__(self, model: LanguageModel, optimizer: Any) -> None:
        places = tuple(f".{target}.weight" for target in TARGETS)
        self._weights = [x for name, x in model.named_parameters() if name.endswith(places)]
        self._optimizer = optimizer

    def told(self, groups: Groups, *, is_split: bool) -> str:
        """How many zeros there are in the whole model; all ranks have to ask.

        Args:
            is_split: copies of the model share the optimizer's weights instead of all having them.
        """
        mine = [main for main, _ in main_weights(self._optimizer, self._weights)]
        zeros, count = sum(int((x == 0).sum()) for x in mine), sum(x.numel() for x in mine)
        copies = 1 if is_split else groups.copies_group.size()
        zeros, count = (int(x) // copies for x in groups.sum_over_ranks(zeros, count))
        dense = "; a dense model can have as many by chance" * (zeros < _BY_CHANCE * count)
        return (
            f"--keep-zeros: {zeros:,} of the {count:,} weights of the layers' matrices "
            f"({zeros / count:.2%}) are zero and stay zero{dense}"
        )

    @torch.no_grad()
    def hold(self) -> None:
        """Keep the next step from changing them; called when the gradients are whole."""
        for main, state in main_weights(self._optimizer, self._weights):
            kept = main != 0
            assert main.grad is not None
            main.grad.mul_(kept)  # a quarter of what masked_fill_ takes on a CPU, and NaN stays NaN
            if "exp_avg" in state:  # from the first step on
                state["exp_avg"].mul_(kept)
