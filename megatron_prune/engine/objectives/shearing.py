"""Learning masks: gates on the model beside whatever else is minimised; an `Objective`.

The gates are drawn for every microbatch from (seed, step, number of the microbatch), so that a
sample meets the same noise on whatever rank it is trained. Their gradients are one flat float32 sum
over all ranks: of heads, groups and FFN channels each rank has its own part, those of hidden
channels and layers are the same on all tensor-parallel ranks, of which one counts, unless sequence
parallelism gives each a part of the tokens. The constraint's gradient is added after that, once.

The plan at the end is made of the gates without noise, by the rules of `planning.make_plan`; with
the gates of what it keeps the model is judged after the last step, and exported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_prune.engine.forward.gates import GatedModel, OpenGates
from megatron_prune.engine.forward.microbatches import Microbatch, Step
from megatron_prune.engine.forward.model import LanguageModel
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.objectives.objective import Objective
from megatron_prune.engine.objectives.shear_decision import Decision
from megatron_prune.model.shape import AXES
from megatron_prune.shearing.masks import Masks
from megatron_prune.shearing.words import (
    BY_LAYER,
    EXPECTED,
    MASKS,
    MULTIPLIERS,
    TARGET,
    UNDECIDED,
)

_SHUT = 0.05  # a unit less likely to stay, or to go, has decided
FREEZES = "freezes"  # in a checkpoint: whether the weights were frozen


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The gates of one microbatch: as a function of the masks, and the leaf that is used."""

    flat: Tensor
    leaf: Tensor
    gates: OpenGates


class Shearing:
    """Gates around another objective.

    Args:
        inner: what is minimised.
        decision: what the masks lead to.
        clip: the largest gradient norm, 0: any; ``is_joint``: of masks and weights together.
        freezes: the weights stay as they are.
        state: its training state, where it continues.
    """

    learns = "masks"

    def __init__(
        self,
        inner: Objective,
        masks: Masks,
        decision: Decision,
        groups: Groups,
        *,
        clip: float,
        is_joint: bool,
        freezes: bool,
        state: Mapping[str, Any] | None,
    ) -> None:
        self.inner, self.masks, self.names = inner, masks, inner.names
        self.decision, self._groups = decision, groups
        self._clip, self._is_joint, self.freezes = clip, is_joint, freezes
        self._at = 0  # steps that are done, or the number of the one under way
        self._drawn: list[Drawn] = []
        self._now: OpenGates | None = None
        self._judged: OpenGates | None = None
        self._kind: str | None = None  # of the judged gates; None: none yet
        self._told: dict[str, Any] = {}
        self._norm = 0.0
        if state is not None:
            self._at = state["iteration"]
            masks.load(state[MASKS])

    def state(self) -> dict[str, Any]:
        mine = {**self.masks.state(), **self.decision.facts(), FREEZES: self.freezes}
        return {**self.inner.state(), MASKS: mine}

    def attach(self, model: LanguageModel) -> None:
        self._model = model
        self.inner.attach(model)
        if self.freezes:
            model.requires_grad_(False)
            if model.pre_process and model.config.recompute_granularity == "full":
                # a recomputed layer passes gradients on only if its input wants one
                model.embedding.register_forward_hook(lambda _, __, hidden: hidden.requires_grad_())
        self._splits_tokens = bool(model.config.sequence_parallel)
        GatedModel(model, self.decision.config, self._groups, lambda: self._now)
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    # ---- gates of a forward pass -------------------------------------------------------------

    def _before_forward(self, model: LanguageModel, _: Any) -> None:
        if not model.training:
            if self._kind is None:
                self.judge("final" if self._at == self.decision.steps else "expected")
            self._now = self._judged
            return
        number = len(self._drawn) * self._groups.data_parallel + self._groups.dp_rank
        flat = self.masks.drawn(self._at - 1, number)
        leaf = flat.detach().to(self._groups.device).requires_grad_()
        gates = OpenGates.of(self.masks.by_axis(leaf), like=self.masks.by_axis(flat))
        self._drawn.append(Drawn(flat=flat, leaf=leaf, gates=gates))
        self._now = gates

    def _after_forward(self, model: LanguageModel, _: Any, out: Tensor) -> None:
        """A layer that is computed again in the backward pass is to meet the same gates, though
        other microbatches have come after it: gradients arrive at the output first."""
        if model.training and out.requires_grad:
            out.register_hook(partial(self._back_to, self._drawn[-1].gates))

    def _back_to(self, gates: OpenGates, _: Tensor) -> None:
        self._now = gates

    @contextmanager
    def without_gates(self) -> Iterator[None]:
        """Between a step's forward passes: the model as it was, in evaluation mode."""
        kept = self._kind, self._judged
        self.judge("none")
        self._model.eval()
        try:
            yield
        finally:
            self._model.train()
            self._kind, self._judged = kept

    def judge(self, kind: str) -> None:
        """Choose the gates that the model has in evaluation, until the next step.

        Args:
            kind: ``final``, those of the final shape; ``expected``, of which as many are shut as
                are expected to be; ``soft``, none is; ``none``: no gates.
        """
        values: Mapping[str, Tensor] | None = None
        if kind == "soft":
            values = self.masks.judged()
        elif kind == "expected":
            values = self.masks.judged_as_expected(self._at)
        elif kind == "final":
            values = self.decision.kept(self.masks)
        device, self._kind = self._groups.device, kind
        self._judged = None
        if values is not None:
            moved = {letter: x.to(device) for letter, x in values.items()}
            self._judged = OpenGates.of(moved, like=values)

    # ---- a step ------------------------------------------------------------------------------

    def beside(self, batches: Iterator[Microbatch], step: Step) -> Iterator[Microbatch]:
        self._at, self._drawn, self._kind = step.iteration, [], None
        self._tell(step.iteration - 1)
        return self.inner.beside(batches, step)

    def loss(self, losses_bs: Tensor, batch: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
        return self.inner.loss(losses_bs, batch)

    @torch.enable_grad()
    def ready(self, scale: float) -> float:
        """Make the gradients of masks and multipliers whole on all ranks."""
        groups, at = self._groups, self._at - 1
        leaves = [one.leaf.grad for one in self._drawn]
        mine = [
            torch.zeros_like(one.flat) if grad is None else self._own(grad).cpu()
            for one, grad in zip(self._drawn, leaves)
        ]
        (found,) = torch.autograd.grad(
            [one.flat for one in self._drawn], [self.masks.parameters], mine
        )
        self._drawn = []
        total = (found / scale / groups.copies_group.size()).to(groups.device)
        dist.all_reduce(total)
        self._norm = self.masks.constrain(total.cpu(), at)
        return self._norm if self._is_joint or not math.isfinite(self._norm) else 0.0

    def _own(self, grad: Tensor) -> Tensor:
        """Of a gradient [n] what this rank adds to the sum over all."""
        groups = self._groups
        if groups.tp_rank and not self._splits_tokens:
            parts = self.masks.by_axis(grad)
            for letter in ("D", "L"):  # the same on all tensor-parallel ranks
                if letter in parts:
                    parts[letter].zero_()
        return grad

    def step(self, share: float, norm: float) -> None:
        of = norm if self._is_joint else self._norm
        scale = min(1.0, self._clip / (of + 1e-6)) if self._clip else 1.0
        self.masks.step(self._at - 1, share, scale)

    # ---- telling -----------------------------------------------------------------------------

    def _tell(self, step: int) -> None:
        """What a logged iteration says of the masks its step began with."""
        masks, held = self.masks, self.masks.constraint
        present = masks.present(step)
        sparsities = [float(s.mean()) for s in held.sparsities(present)]
        rows = zip(held.words, sparsities, held.targets(step), *masks.lambdas.tolist())
        self._told = {}
        for word, sparsity, target, *lambdas in rows:
            self._told[f"{EXPECTED} {word}"] = sparsity
            self._told[f"{TARGET} {word}"] = target
            for name, value in zip(MULTIPLIERS, lambdas):
                self._told[f"{name} {word}"] = value
        for letter, x in present.items():
            open_or_shut = (x < _SHUT) | (x > 1 - _SHUT)
            self._told[f"{UNDECIDED} {AXES[letter].word}"] = 1 - float(open_or_shut.float().mean())
        self._told[BY_LAYER] = {
            AXES[letter].word: (1 - (x[0] if letter == "L" else x.mean(1))).tolist()
            for letter, x in present.items()
            if letter != "D"
        }

    def distances(self) -> dict[str, tuple[float, float]]:
        """What is held to a target: the sparsity that the masks have come to, and the target."""
        held = self.masks.constraint
        found = held.sparsities(self.masks.present(self._at))
        return {w: (float(s.mean()), t) for w, s, t in zip(held.words, found, held.final)}

    def told(self) -> dict[str, Any]:
        return self._told
