"""How far the student's hidden states are from the teacher's: 1 - cosine, of mapped layers.

Where the widths differ, a learned linear map without bias takes the student's states to the
teacher's width, one a pair of layers. The maps are trained with the model and saved with its
checkpoint, and are no part of the model: whatever reads it by name (`convert`, `evaluate`) leaves
them out.

Shape suffixes: s sequence (this rank's part of it under sequence or context parallelism), b batch,
D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.groups import Groups


class Projections(torch.nn.Module):
    """The learned maps; drawn from the seed so that lengths are kept on average."""

    def __init__(
        self, count: int, widths: tuple[int, int], seed: int, config: Any, device: torch.device
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weights = torch.nn.ParameterList()
        for _ in range(count):
            drawn = torch.randn(widths[1], widths[0], generator=generator) / widths[1] ** 0.5
            weight = torch.nn.Parameter(drawn.to(device, config.params_dtype))
            # each rank sees its part of the sequence: Megatron sums such gradients over TP
            weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            self.weights.append(weight)


class HiddenLoss:
    """Watches the mapped layers of student and teacher, and compares what they gave last.

    The student must not be recomputed in full and both must have one pipeline stage. Memory: the
    watched hidden states of one microbatch, of which the student's are kept for backward anyway.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[int, int]],
        student: LanguageModel,
        teacher: LanguageModel,
        groups: Groups,
        seed: int,
    ) -> None:
        self._groups, self._split = groups, bool(student.config.sequence_parallel)
        self._student: dict[int, Tensor] = {}
        self._teacher: dict[int, Tensor] = {}
        self._projections: Projections | None = None
        widths = student.config.hidden_size, teacher.config.hidden_size
        if widths[0] != widths[1]:
            self._projections = Projections(len(pairs), widths, seed, student.config, groups.device)
            student.distill_projections = self._projections
        for number, (mine, theirs) in enumerate(pairs):
            _watch(student.decoder.layers[mine], self._student, number)
            _watch(teacher.decoder.layers[theirs], self._teacher, number)

    @property
    def is_projected(self) -> bool:
        return self._projections is not None

    def take(self, mask_bs: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """The mean over pairs and unmasked tokens of the last forward passes, which are forgotten.

        Returns:
            This rank's share, with a gradient (of its part of the sequence under sequence
            parallelism, else the whole); and that of all tensor-parallel ranks, detached.
        """
        mask_sb = mask_bs.t()
        if self._split:
            mask_sb = mask_sb.chunk(self._groups.grid.tensor_parallel)[self._groups.tp_rank]
        losses = []
        for number, student_sbD in self._student.items():
            if self._projections is not None:
                student_sbD = F.linear(student_sbD, self._projections.weights[number])
            likeness = F.cosine_similarity(
                student_sbD.float(), self._teacher[number].float(), dim=-1
            )
            losses.append(((1 - likeness) * mask_sb).sum() / counted)
        self._student.clear()
        self._teacher.clear()
        mine = torch.stack(losses).mean()
        whole = mine.detach().clone()
        if self._split:
            dist.all_reduce(whole, group=self._groups.tp_group)
        return mine, whole


def _watch(layer: torch.nn.Module, states: dict[int, Tensor], number: int) -> None:
    """Keep what a layer gives, until it is taken."""

    def keep(_: Any, __: Any, found: Any) -> None:
        states[number] = found[0] if isinstance(found, tuple) else found

    layer.register_forward_hook(keep)
