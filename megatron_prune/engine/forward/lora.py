"""Low-rank adaptation in Megatron's linears: exact at every layout, see `model.lora`.

A linear computes with W + scale * B @ A as one weight, made anew for each forward and each backward
pass: what is trained is what an export holds, and no second copy of the weights is kept. Gradients
of the factors are made of the linear's input and output gradient alone, but with
``--lora-keep-zeros``, which takes the gradient of one whole weight at a time.

B of a column-parallel linear is split as W is and A is replicated, in a row-parallel one the other
way round; the gradient of the replicated factor, [rank, in] or [out, rank], is summed over
tensor-parallel ranks. The forward pass communicates nothing more. With sequence parallelism the
backward pass gathers the input again, as Megatron's own does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter

from megatron_prune.engine.forward.weights import canonical_name
from megatron_prune.engine.groups import Groups
from megatron_prune.model.fusion import fused_of
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lora import (
    PARTS,
    ROW_PARALLEL,
    A,
    B,
    Lora,
    factor_shapes,
    is_factor,
    merged,
)
from megatron_prune.model.shape import ModelConfig, ModelShape
from megatron_prune.model.tensors import generator_of


class _WithFactors(torch.autograd.Function):
    """A linear's output as it is; its backward pass makes the gradients of the factors."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, x: Tensor, a: Tensor, b: Tensor, weight: Tensor, lora: Lora, sp: Any
    ) -> Tensor:
        """``sp``: the group that ``x`` is split over along its sequence, None when it is whole."""
        ctx.save_for_backward(x, a, b, weight)
        ctx.lora, ctx.sp = lora, sp
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad_sbO: Tensor) -> tuple[Tensor | None, ...]:
        x_sbI, a_rI, b_Or, weight_OI = ctx.saved_tensors
        if ctx.sp is not None:
            x_sbI = gather_from_sequence_parallel_region(x_sbI, group=ctx.sp)
        grad_nO, x_nI, scale = grad_sbO.flatten(0, 1), x_sbI.flatten(0, 1), ctx.lora.scale
        if ctx.lora.keep_zeros:  # a masked product has no shorter way than through the weight's
            grad_OI = (grad_nO.t() @ x_nI).masked_fill_(weight_OI == 0, 0)
            grad_a, grad_b = b_Or.t() @ grad_OI, grad_OI @ a_rI.t()
        else:
            grad_a, grad_b = (grad_nO @ b_Or).t() @ x_nI, grad_nO.t() @ (x_nI @ a_rI.t())
        return grad_sbO, None, scale * grad_a, scale * grad_b, None, None, None


class _Adapted(torch.nn.Module):
    """One of Megatron's linears with factors, this rank's part of them.

    Attributes:
        split: its tensors that tensor parallelism splits, and along which dim.
    """

    split: ClassVar[Mapping[str, int]]
    weight: Parameter
    tp_group: torch.distributed.ProcessGroup

    def __init__(self, *args: Any, lora: Lora, is_gated: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lora, self._is_gated = lora, is_gated
        rows, columns = self.weight.shape
        for name, size in ((A, (lora.rank, columns)), (B, (rows, lora.rank))):
            factor = Parameter(self.weight.new_empty(size))
            if name in self.split:
                set_tensor_model_parallel_attributes(factor, True, self.split[name], 1)
            self.register_parameter(name, factor)

    def _factor(self, name: str) -> Tensor:
        factor: Tensor = getattr(self, name)
        if name in self.split:
            return factor
        shared: Tensor = copy_to_tensor_model_parallel_region(factor, group=self.tp_group)
        return shared

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        a, b, lora = self._factor(A), self._factor(B), self.lora
        with torch.no_grad():
            whole = merged(weight, a, b, lora)
        place = whole.data_ptr()

        def keep(x: Tensor) -> Tensor | None:
            return None if x.data_ptr() == place else x

        def make_again(x: Tensor | None) -> Tensor:
            return merged(weight, a, b, lora) if x is None else x

        with saved_tensors_hooks(keep, make_again):
            out: Tensor = super()._forward_impl(input, whole, *args, **kwargs)  # type: ignore[misc]
        sp = self.tp_group if kwargs["sequence_parallel"] else None
        with_factors: Tensor = _WithFactors.apply(out, input, a, b, weight, lora, sp)
        return with_factors

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self.split,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self._is_gated:  # stored as [gate; up], as Megatron's MLP stores the weight
            key = f"{prefix}{B}"
            found[key] = apply_swiglu_sharded_factory(found[key], sharded_offsets)
        return found


class AdaptedColumn(_Adapted, ColumnParallelLinear):
    split: ClassVar[Mapping[str, int]] = {"weight": 0, "bias": 0, B: 0}


class AdaptedRow(_Adapted, RowParallelLinear):
    split: ClassVar[Mapping[str, int]] = {"weight": 1, A: 1}


def adapt_spec(layer_spec: Any, lora: Lora) -> None:
    """Put linears with factors into a spec of Megatron's own layers."""
    for target in lora.targets:
        module = PARTS[target][0].partition(".")[0]
        linears = getattr(layer_spec.submodules, module).submodules
        kind = AdaptedRow if target in ROW_PARALLEL else AdaptedColumn
        fused = fused_of(PARTS[target][0])
        given = {"lora": lora, "is_gated": fused is not None and not fused.by_group}
        setattr(linears, target, ModuleSpec(module=kind, params=given))


def start_factors(model: GPTModel, config: ModelConfig, groups: Groups, seed: int) -> None:
    """Draw the factors, the same for the same seed at every layout; nothing else is trained.

    As in the paper's code and peft: A uniform within 1 / sqrt(in), B zero.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_factor(name))
        if not is_factor(name):
            continue
        if name.endswith(B):
            torch.nn.init.zeros_(parameter)
            continue
        rank, columns = parameter.shape
        is_split = getattr(parameter, "tensor_model_parallel", False)
        parts = groups.grid.tensor_parallel if is_split else 1
        whole = torch.rand(
            (rank, columns * parts),
            generator=generator_of(seed, canonical_name(name, config, groups)),
        )
        mine = whole.chunk(parts, dim=1)[groups.tp_rank if is_split else 0]
        with torch.no_grad():
            parameter.copy_((2 * mine - 1) / math.sqrt(columns * parts))
    if model.pre_process and model.config.recompute_granularity == "full":
        # a recomputed layer passes gradients on only if its input wants one
        model.embedding.register_forward_hook(lambda _, __, hidden: hidden.requires_grad_())


def factor_parameters(lora: Lora, shape: ModelShape, grid: ParallelGrid, pp_rank: int) -> int:
    """Factors' parameters that one rank of a pipeline stage holds."""
    per_layer = 0
    for target in lora.targets:
        for name, (rows, columns) in factor_shapes(target, shape, lora.rank).items():
            split = name == (A if target in ROW_PARALLEL else B)
            per_layer += rows * columns // (grid.tensor_parallel if split else 1)
    return per_layer * len(grid.stage_layers(shape.num_layers, pp_rank))
