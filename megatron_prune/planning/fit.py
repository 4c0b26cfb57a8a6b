"""How weights of a pruned model are fitted, and what of a plan it looks at."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_prune.planning.plan import PrunePlan

STATISTICS = ("sequential", "dense")
FIT_TARGETS = ("own", "dense", "stream")
DAMPING = {"own": 0.01, "dense": 0.01, "stream": 0.1}  # by target
READERS_DAMPING = 0.01


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How weights are fitted by least squares.

    Attributes:
        target: what the fitted output should be. ``own``: what the layer with all its heads and
            channels makes of the same input. ``dense``: what the unpruned model's layer makes of
            its own. ``stream``: what brings the hidden state to the unpruned model's, errors of all
            layers before included, and what dropped layers would add next.
        readers: whether ``linear_qkv`` and ``linear_fc1`` are fitted too, so that they read from
            the kept channels what the unpruned model's norm would give them.
        damping, readers_damping: see `least_squares.fit`.
        statistics: ``sequential``, inputs as the repaired layers below make them, or ``dense``, as
            the unpruned model does.
    """

    target: str
    readers: bool
    damping: float
    readers_damping: float = READERS_DAMPING
    statistics: str = "sequential"

    def __post_init__(self) -> None:
        assert self.statistics in STATISTICS and self.target in FIT_TARGETS
        assert self.statistics == "sequential" or (self.target == "own" and not self.readers)

    @classmethod
    def for_plan(
        cls,
        plan: PrunePlan,
        *,
        target: str | None = None,
        readers: bool | None = None,
        damping: float | None = None,
        readers_damping: float = READERS_DAMPING,
        statistics: str = "sequential",
    ) -> Fit:
        """What is not given, as docs/score.md found it best: without its hidden channels or
        layers a model strays, and fitting each layer to itself does not bring it back."""
        strays = plan.kept.hidden is not None or plan.kept.layers is not None
        if target is None:
            target = "stream" if strays and statistics == "sequential" else "own"
        if readers is None:
            readers = target == "stream"
        return cls(
            target=target,
            readers=readers,
            damping=DAMPING[target] if damping is None else damping,
            readers_damping=readers_damping,
            statistics=statistics,
        )

    @property
    def needs_dense(self) -> bool:
        """Whether the dense model runs beside the pruned one."""
        return self.statistics == "dense" or self.target != "own" or self.readers

    @property
    def moves_dense_first(self) -> bool:
        """Whether the dense hidden states pass a half before it is fitted."""
        return self.needs_dense and self.statistics != "dense" and self.target != "dense"

    def __str__(self) -> str:
        readers = f", readers too (damping {self.readers_damping:g})" if self.readers else ""
        return f"target {self.target} (damping {self.damping:g}){readers}"

    def fits(self, plan: PrunePlan) -> bool:
        """Whether there is anything to fit."""
        return drops_inputs(plan) or self.target != "own" or self.readers


def drops_inputs(plan: PrunePlan) -> bool:
    """Whether projections lose inputs by a plan."""
    kept = plan.kept
    return any(axis is not None for axis in (kept.heads, kept.query_groups, kept.ffn))


def without_units(plan: PrunePlan) -> PrunePlan:
    """The plan's layers and hidden channels alone: heads, groups, FFN and vocabulary whole."""
    kept = replace(plan.kept, heads=None, query_groups=None, ffn=None, vocab=None)
    return replace(plan, kept=kept)


def with_all_channels(plan: PrunePlan) -> PrunePlan:
    """The plan with all hidden channels."""
    return replace(plan, kept=replace(plan.kept, hidden=None))
