"""What learned gates lead to: a plan, scores, and the gates of what is kept.

The decision is the plan's (`planning.make_plan`): the highest gates stay, of equal ones the lower
index; heads equally many in every group, balanced where that is asked for. It is the same whoever
makes it: the run after its last step, or a command on what the run has saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_prune.model.axes import count_parameters
from megatron_prune.model.lazy import Tensor, torch
from megatron_prune.model.shape import AXES, ModelConfig, ModelShape
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.scores import Scores
from megatron_prune.shearing.masks import Masks
from megatron_prune.shearing.rounding import legal_shape
from megatron_prune.shearing.units import Gated, gated_axes
from megatron_prune.shearing.words import GATES

OPEN = 1e-6
"""Of a hidden channel that is kept, at least: what its gate is when it is shut but the shape has
room for it. Of a gate of 0 the gated norm would not count the channel, and the pruned one would."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Everything that the plan of a run depends on, but for its masks.

    Attributes:
        config: of the model before it is pruned.
        target: the shape to come to; None where ``target_params`` says its size.
        ranks: tensor-parallel ranks of which each keeps equally many; 1: no matter which.
        source_digest: of the model the run began with.
        method, steps: how the masks are learned, and of how many steps.
    """

    config: ModelConfig
    target: ModelShape | None
    target_params: int | None
    prune_type: str
    ranks: int
    mask_units: str | None
    seed: int
    source_digest: str
    method: str
    steps: int

    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of it; plain values."""
        return {
            "target": None if self.target is None else self.target.as_dict(),
            "target_params": self.target_params,
            "prune_type": self.prune_type,
            "ranks": self.ranks,
            "mask_units": self.mask_units,
            "seed": self.seed,
            "source_digest": self.source_digest,
            "method": self.method,
            "steps": self.steps,
        }

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], config: ModelConfig) -> Decision:
        """What `facts` said; of a model with ``config``."""
        names = cls.__dataclass_fields__.keys() - {"config", "target"}
        target = None if facts["target"] is None else ModelShape.from_dict(facts["target"])
        return cls(config=config, target=target, **{name: facts[name] for name in names})

    @property
    def axes(self) -> tuple[Gated, ...]:
        """The axes with gates."""
        return gated_axes(self.config.shape, self.target, self.mask_units, self.ranks)

    def shape(self, masks: Masks) -> ModelShape:
        """The shape that is kept."""
        return self.target or self._legal(masks.present(self.steps))

    def check_size(self) -> None:
        """Refuse a size below that of every shape.

        Raises:
            PlanError: it is.
        """
        if self.target is None:
            self._legal(
                {axis.letter: torch.full((axis.rows, axis.size), 1e-6) for axis in self.axes}
            )

    def _legal(self, present: Mapping[str, Tensor]) -> ModelShape:
        assert self.target_params is not None
        return legal_shape(
            present,
            self.config.shape,
            self.target_params,
            self.ranks,
            lambda shape: count_parameters(replace(self.config, shape=shape)),
        )

    def plan(self, masks: Masks, source_digest: str | None = None) -> PrunePlan:
        """What is kept of the model.

        Args:
            source_digest: of the model that is to be cut (default: the one the run began with).
        """
        scores, shape, kept = masks.scores(), self.config.shape, self.shape(masks)

        def criterion(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
            if axis not in scores:  # heads without gates, all of which stay in their groups
                return torch.ones(size)
            return scores[axis][0 if layer is None else layer]

        targets = Targets(
            hidden_size=kept.hidden_size,
            ffn_hidden_size=kept.ffn_hidden_size,
            num_attention_heads=kept.num_attention_heads,
            num_query_groups=kept.num_query_groups,
            num_layers=kept.num_layers,
        )
        return make_plan(
            shape,
            targets,
            criterion,
            criterion_name=GATES,
            seed=self.seed,
            prune_type=self.prune_type,
            balance_for=self.ranks,
            source_digest=source_digest or self.source_digest,
        )

    def _open(self, masks: Masks) -> dict[str, Tensor]:
        """The gates that units have if they are kept, by axis letter."""
        found = masks.judged()
        return {letter: x.clamp(min=OPEN) if letter == "D" else x for letter, x in found.items()}

    def kept(self, masks: Masks) -> dict[str, Tensor]:
        """The gates of the final shape by axis letter, [rows, size] of the whole model, those of
        all that goes shut; in layers that go they are no matter."""
        plan, found = self.plan(masks), {}
        for letter, values in self._open(masks).items():
            stays = torch.zeros_like(values, dtype=torch.bool)
            if not AXES[letter].is_per_layer:
                stays[0, list(plan.layers if letter == "L" else plan.indices(letter))] = True
            else:
                for layer in plan.layers:
                    stays[layer, list(plan.indices(letter, layer))] = True
            found[letter] = values * stays
        return found

    def folded(self, masks: Masks, plan: PrunePlan) -> dict[str, Tensor]:
        """The gates of what a plan keeps, in the pruned model's numbers: hidden [D], layers [L],
        all others [L, n]."""
        found = {}
        for letter, values in self._open(masks).items():
            if letter == "L":
                found[letter] = values[0, list(plan.layers)]
            elif not AXES[letter].is_per_layer:
                found[letter] = values[0, list(plan.indices(letter))]
            else:
                rows = [values[n, list(plan.indices(letter, n))] for n in plan.layers]
                found[letter] = torch.stack(rows)
        return found

    def scores(self, masks: Masks, provenance: Mapping[str, Any]) -> Scores:
        """What decides, as scores, so that `plan --scores` makes other shapes of them."""
        found = {n: x if AXES[n].is_per_layer else x[0] for n, x in masks.scores().items()}
        if "K" in found:  # a head is worth what it and its group are
            of_group = found["K"].repeat_interleave(self.config.shape.heads_per_group, 1)
            found["Q"] = found["Q"] * of_group if "Q" in found else of_group
        return Scores(
            shape=self.config.shape,
            source_digest=self.source_digest,
            criteria={GATES: found},
            provenance=provenance,
        )
