"""What is kept of a model, and by which scores: flags of `plan` that `prune` takes too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prune.criteria import CRITERIA
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.families.block_configs import FFN_MULTIPLE, says_ffn_mult
from megatron_prune.families.config import check_widths
from megatron_prune.files.parsing import read_json
from megatron_prune.flags import Group, flag, given_flags, positive
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.costs import weight_bytes
from megatron_prune.model.shape import SCORED_AXES, ModelConfig
from megatron_prune.planning.allocation import COMPARISONS, Nonuniform
from megatron_prune.planning.choose import Targets, make_plan, parse_layers
from megatron_prune.planning.margins import decisions, rounding_text
from megatron_prune.planning.plan import PRUNE_TYPES, PrunePlan
from megatron_prune.planning.scores import Criterion, Scores, load_scores
from megatron_prune.sources.source import Source
from megatron_prune.stages.common import AllowsNonfinite, shape_table
from megatron_prune.stages.console import Console

PLAN = Group("plan")
NONUNIFORM = Group("layers that keep different numbers of FFN channels")
_REMAIN = ("hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups")

Planner = Callable[[Targets], PrunePlan]
Search = Callable[[Source, Criterion, Planner, Targets], Targets]
"""(source, criterion, what makes a plan of targets, those that are named) -> all of them."""


def _remain(name: str) -> Any:
    return flag(f"{name} to keep", default=None, metavar="N", group=PLAN)


@dataclass(frozen=True, kw_only=True)
class PlanFlags(AllowsNonfinite):
    """Of a stage that decides what is kept."""

    hidden_size_remain: int | None = _remain("hidden_size")
    num_attention_heads_remain: int | None = _remain("num_attention_heads")
    ffn_hidden_size_remain: int | None = _remain("ffn_hidden_size")
    num_query_groups_remain: int | None = _remain("num_query_groups")
    drop_layers: str | None = flag(
        "layers to remove, such as 7,13,18-20 (from 0)", default=None, metavar="LAYERS", group=PLAN
    )
    num_layers_remain: int | None = flag(
        "layers to keep: the highest-scored", default=None, metavar="N", group=PLAN
    )
    prune_type: str = flag(
        "balance: as many on each rank", default="balance", choices=PRUNE_TYPES, group=PLAN
    )
    balance_for: int | None = flag(
        "TP size to balance for (default: the source's)", default=None, metavar="N", group=PLAN
    )
    scores: Path | None = flag(
        "file of `megatron-prune score`", default=None, metavar="SCORES", group=PLAN
    )
    criterion: str = flag(
        "random, or one that the scores hold; composites as activation+2*wanda, "
        "one for each axis as hidden=residual-energy,heads=wanda,ffn=wanda,layers=perplexity",
        default="random",
        metavar="NAME",
        group=PLAN,
    )
    seed: int = flag("of the criterion's random numbers", default=1234, group=PLAN)
    prune_config_path: Path | None = flag(
        "hidden_size_remain, num_attention_heads_remain, ffn_hidden_size_remain, drop_layers",
        default=None,
        metavar="JSON",
        group=PLAN,
    )
    nonuniform: bool = flag(
        "--ffn-hidden-size-remain is of each layer on average: keep the best of all layers. "
        "Few load the result; Llama and --to hf only",
        default=False,
        group=NONUNIFORM,
    )
    nonuniform_floor: float = flag(
        "least a layer keeps, as a share of the average",
        default=Nonuniform.floor,
        metavar="X",
        group=NONUNIFORM,
    )
    nonuniform_multiple: int = flag(
        "every layer keeps a multiple of it; with 256 more engines load it",
        default=Nonuniform.multiple,
        parse=positive,
        metavar="N",
        group=NONUNIFORM,
    )
    nonuniform_scores: str = flag(
        "log: their logarithms, in standard deviations from the layer's mean; "
        "standardized: the same of the scores; raw: as they are",
        default=Nonuniform.scores,
        choices=COMPARISONS,
        group=NONUNIFORM,
    )

    @property
    def asks_for_pruning(self) -> bool:
        """Whether any target was given."""
        given = [getattr(self, f"{name}_remain") for name in (*_REMAIN, "num_layers")]
        return any(x is not None for x in (*given, self.drop_layers, self.prune_config_path))

    @property
    def targets(self) -> Targets:
        """What is to remain: flags, and the predecessor's JSON for what no flag names.

        Raises:
            ConfigError, PlanError: not numbers and layers.
        """
        values = _from_file(self.prune_config_path) if self.prune_config_path else {}
        for name in (*(f"{name}_remain" for name in _REMAIN), "drop_layers"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        layers = values.get("drop_layers")
        if isinstance(layers, list):
            layers = ",".join(map(str, layers)) or None  # the predecessor's way to drop none
        dropped = () if layers is None else parse_layers(str(layers))
        remain = {name: values.get(f"{name}_remain") for name in _REMAIN}
        return Targets(**remain, num_layers=self.num_layers_remain, drop_layers=dropped)  # type: ignore[arg-type]

    @property
    def rules(self) -> Nonuniform | None:
        """Those of ``--nonuniform``, None without it."""
        return (
            Nonuniform(
                floor=self.nonuniform_floor,
                multiple=self.nonuniform_multiple,
                scores=self.nonuniform_scores,
            )
            if self.nonuniform
            else None
        )

    def check_nonuniform(self) -> None:
        """Refuse the flags of ``--nonuniform`` without it, or with values that cannot be used.

        Raises:
            ConfigError: see the messages.
        """
        if not self.nonuniform:
            for name in given_flags(self, NONUNIFORM):
                raise ConfigError(f"{name}: needs --nonuniform")
            return
        if self.targets.ffn_hidden_size is None:
            raise ConfigError(
                "--nonuniform: needs --ffn-hidden-size-remain, the FFN channels of a layer on "
                "average"
            )
        if not 0 <= self.nonuniform_floor <= 1:
            raise ConfigError(
                f"--nonuniform-floor {self.nonuniform_floor}: is a share; wanted 0 to 1"
            )

    def balance(self, source: Source) -> int:
        """``--balance-for``, by default the source's tensor-parallel size."""
        return source.grid.tensor_parallel if self.balance_for is None else self.balance_for


def decide(
    options: PlanFlags, source: Source, console: Console, search: Search | None = None
) -> PrunePlan:
    """The plan that the options ask for.

    Args:
        search: finds the sizes that no option names.

    Raises:
        PlanError, ShapeError, CheckpointError: this model cannot be pruned so.
    """
    source.config.shape.check_uniform("plan", "prune its source anew")
    if options.nonuniform:
        check_widths(source.config.family)
    scores, targets = _scores(options, source), options.targets
    name = options.criterion
    criterion = CRITERIA[name] if scores is None else scores.criterion(name)
    planner = partial(
        make_plan,
        source.config.shape,
        criterion=criterion,
        criterion_name=name,
        seed=options.seed,
        prune_type=options.prune_type,
        balance_for=options.balance(source),
        source_digest=source.digest,
        nonuniform=options.rules,
    )
    if search is not None:
        targets = search(source, criterion, planner, targets)
    plan = planner(targets)
    if scores is not None:
        axes = SCORED_AXES.replace(
            "L", "" if targets.drop_layers else "L"
        )  # layers that are named are no decision
        if text := rounding_text([*decisions(plan, scores.terms(name), axes)]):
            console.say(f"warning: {text}")
    return plan


def plan_table(source: ModelConfig, plan: PrunePlan) -> str:
    """Source and target side by side, sizes and costs."""
    after = replace(source, shape=plan.target)
    rows = [f"{'':<22}{'source':>10}{'target':>10}", shape_table(plan.source, plan.target)]
    for what, cost in (("parameters (M)", count_parameters), ("bytes (MB)", weight_bytes)):
        rows.append(f"{what:<22}{cost(source) / 1e6:>10.1f}{cost(after) / 1e6:>10.1f}")
    return "\n".join(rows)


def warn_not_loadable(source: ModelConfig, plan: PrunePlan, console: Console) -> None:
    """Say, while it is cheap to change, which engines will refuse what the plan leaves."""
    shape, derive = plan.target, source.family.head_dim_derived_by
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if shape.ffn_per_layer is not None:
        derive = ("llama.cpp", "mlx-lm")  # of a Nemotron-NAS model
        also = "SGLang, TensorRT-LLM, llama.cpp and mlx-lm read it too"
        if not says_ffn_mult(shape):
            also = f"no other engine does, unless with --nonuniform-multiple {FFN_MULTIPLE}"
        console.say(
            f"warning: layers keep {min(shape.ffn_per_layer)} to {shape.ffn_hidden_size} FFN "
            "channels. LlamaForCausalLM of transformers and Megatron-LM do not load that; as a "
            "Nemotron-NAS model (DeciLMForCausalLM, --to hf) transformers and vLLM do, with "
            f"trust_remote_code; {also}. See docs/nonuniform.md"
        )
    if source.family.hidden_multiple_of_heads and hidden % heads:
        near = " or ".join(
            str(n) for n in (hidden // heads * heads, -(-hidden // heads) * heads) if n
        )
        console.say(
            f"warning: hidden_size {hidden} is not a multiple of {heads} heads; transformers 5 "
            f"does not load such a {source.family} model, though head_dim is given. Nearest: {near}"
        )
    if derive and hidden != heads * shape.kv_channels:
        console.say(
            f"warning: {heads} heads of {shape.kv_channels} channels are not hidden_size {hidden}; "
            f"{', '.join(derive)} take hidden_size / heads for head_dim in family {source.family} "
            f"and do not load that. With hidden_size {heads * shape.kv_channels} they do"
        )


def _scores(options: PlanFlags, source: Source) -> Scores | None:
    """The scores that the flags choose to decide by, of this very model; None when by none.

    Raises:
        PlanError: no such criterion, or the scores of another model.
    """
    if options.scores is None:
        if options.criterion not in CRITERIA:
            raise ConfigError(
                f"--criterion {options.criterion}: without --scores only {', '.join(CRITERIA)}; "
                "make scores with `megatron-prune score`"
            )
        return None
    if options.criterion in CRITERIA:
        raise ConfigError(
            f"--scores with --criterion {options.criterion}, which needs none; name one"
        )
    scores, found = load_scores(options.scores), source.digest
    if scores.source_digest != found:
        raise PlanError(
            f"--scores {options.scores}: of another model ({scores.source_digest[:12]}..., this "
            f"one is {found[:12]}...); score {source.path}"
        )
    return scores


def _from_file(path: Path) -> dict[str, object]:
    values = read_json(path, ConfigError, flag="--prune-config-path")
    known = {*(f"{name}_remain" for name in _REMAIN), "drop_layers"}
    if not isinstance(values, dict) or set(values) - known:
        unknown = sorted(set(values) - known) if isinstance(values, dict) else values
        raise ConfigError(
            f"--prune-config-path {path}: unknown {unknown}; wanted {', '.join(sorted(known))}"
        )
    for key, value in values.items():
        if key != "drop_layers" and value is not None and type(value) is not int:
            raise ConfigError(f"--prune-config-path {path}: {key} is {value!r}; wanted an integer")
    return values
