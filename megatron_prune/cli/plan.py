"""Decide what is kept, and write it down as a plan file.

  megatron-prune plan --load llama --save plan.json --hidden-size-remain 3072 \\
      --num-attention-heads-remain 24 --ffn-hidden-size-remain 8256 --drop-layers 7,13,18-20 \\
      --balance-for 8

  megatron-prune plan --load llama --save plan.json --scores scores.safetensors \\
      --criterion wanda --ffn-hidden-size-remain 8256

  megatron-prune plan --load llama --save plan.json --scores scores.safetensors \\
      --criterion wanda --ffn-hidden-size-remain 8192 --nonuniform --nonuniform-multiple 256

  megatron-prune plan --load llama --save plan.json --scores scores.safetensors \\
      --criterion activation --target-params 3.4B --candidates 8 --evaluate-data valid.txt

  torchrun --nproc-per-node 8 -m megatron_prune plan --load llama --save plan.json --rounds 3 \\
      --criterion activation --data calibration.jsonl --tensor-model-parallel-size 8 \\
      --balance-for 8 --ffn-hidden-size-remain 8256

Every target is optional; what is not named is kept whole, or with a budget as large as fits. Reads
a few values of the source to fingerprint it, no tensor; --evaluate-data runs the pruned models, and
--rounds scores the model again as it shrinks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

from megatron_prune.cli import options
from megatron_prune.cli.plan_search import (
    add_search_arguments,
    asks_for_search,
    check_search,
    search_inputs,
    search_targets,
)
from megatron_prune.cli.rounds import add_round_arguments, check_rounds, plan_in_rounds
from megatron_prune.criteria import CRITERIA
from megatron_prune.errors import ConfigError, PlanError
from megatron_prune.families.block_configs import FFN_MULTIPLE, says_ffn_mult
from megatron_prune.families.config import check_widths
from megatron_prune.files import replace_file
from megatron_prune.model.axes import count_parameters
from megatron_prune.model.costs import weight_bytes
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.allocation import COMPARISONS, Nonuniform
from megatron_prune.planning.choose import Targets, make_plan, parse_layers
from megatron_prune.planning.margins import decisions, rounding_text
from megatron_prune.planning.plan import PRUNE_TYPES, PrunePlan
from megatron_prune.planning.scores import Scores, load_scores
from megatron_prune.ranks import is_first_rank
from megatron_prune.sources.source import Source

_REMAIN = ("hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags a plan is made from; ``prune`` takes them too."""
    group = parser.add_argument_group("plan")
    for name in _REMAIN:
        flag = name.replace("_", "-")
        group.add_argument(f"--{flag}-remain", type=int, metavar="N", help=f"{name} to keep")
    group.add_argument(
        "--drop-layers", metavar="LAYERS", help="layers to remove, such as 7,13,18-20 (from 0)"
    )
    group.add_argument(
        "--num-layers-remain", type=int, metavar="N", help="layers to keep: the highest-scored"
    )
    group.add_argument(
        "--prune-type", choices=PRUNE_TYPES, default="balance", help="balance: as many on each rank"
    )
    group.add_argument(
        "--balance-for",
        type=int,
        metavar="N",
        help="TP size to balance for (default: the source's)",
    )
    group.add_argument(
        "--scores", type=Path, metavar="SCORES", help="file of `megatron-prune score`"
    )
    group.add_argument(
        "--criterion",
        default="random",
        metavar="NAME",
        help="random (default), or one that the scores hold; composites as activation+2*wanda, "
        "one for each axis as hidden=residual-energy,heads=wanda,ffn=wanda,layers=perplexity",
    )
    group.add_argument(
        "--seed", type=int, default=1234, help="of the criterion's random numbers (default: 1234)"
    )
    group.add_argument(
        "--prune-config-path",
        type=Path,
        metavar="JSON",
        help="hidden_size_remain, num_attention_heads_remain, ffn_hidden_size_remain, drop_layers",
    )
    _add_nonuniform_arguments(parser)


def _add_nonuniform_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = Nonuniform()
    group = parser.add_argument_group("layers that keep different numbers of FFN channels")
    group.add_argument(
        "--nonuniform",
        action="store_true",
        help="--ffn-hidden-size-remain is of each layer on average: keep the best of all layers. "
        "Few load the result; Llama and --to hf only",
    )
    group.add_argument(
        "--nonuniform-floor",
        type=float,
        metavar="X",
        help=f"least a layer keeps, as a share of the average (default: {defaults.floor})",
    )
    group.add_argument(
        "--nonuniform-multiple",
        type=options.positive,
        metavar="N",
        help="every layer keeps a multiple of it (default: 1); with 256 more engines load it",
    )
    group.add_argument(
        "--nonuniform-scores",
        choices=COMPARISONS,
        help="log: their logarithms, in standard deviations from the layer's mean (default); "
        "standardized: the same of the scores; raw: as they are",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_load(parser)
    parser.add_argument("--save", type=Path, required=True, metavar="PLAN", help="plan file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing plan")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    add_plan_arguments(parser)
    add_search_arguments(parser)
    add_round_arguments(parser)


def asks_for_pruning(args: argparse.Namespace) -> bool:
    """Whether any target was given."""
    given = [getattr(args, f"{name}_remain") for name in (*_REMAIN, "num_layers")]
    return any(x is not None for x in (*given, args.drop_layers, args.prune_config_path))


def _from_file(path: Path) -> dict[str, object]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--prune-config-path {path}: {error}") from None
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


def targets_from(args: argparse.Namespace) -> Targets:
    """What is to remain: flags, and the predecessor's JSON for what no flag names."""
    values = _from_file(args.prune_config_path) if args.prune_config_path else {}
    for name in (*(f"{name}_remain" for name in _REMAIN), "drop_layers"):
        if getattr(args, name) is not None:
            values[name] = getattr(args, name)
    layers = values.get("drop_layers")
    if isinstance(layers, list):
        layers = ",".join(map(str, layers)) or None  # the predecessor's way to drop none
    dropped = () if layers is None else parse_layers(str(layers))
    remain = {name: values.get(f"{name}_remain") for name in _REMAIN}
    return Targets(**remain, num_layers=args.num_layers_remain, drop_layers=dropped)  # type: ignore[arg-type]


def nonuniform_from(args: argparse.Namespace) -> Nonuniform | None:
    """The rules of ``--nonuniform``, None without it.

    Raises:
        ConfigError: its flags without it, or a value that cannot be used.
    """
    given = {
        name: value
        for name in ("floor", "multiple", "scores")
        if (value := getattr(args, f"nonuniform_{name}")) is not None
    }
    if not args.nonuniform:
        if given:
            raise ConfigError(f"--nonuniform-{next(iter(given))}: needs --nonuniform")
        return None
    if getattr(args, "rounds", None) is not None:  # of plan alone
        raise ConfigError(
            "--nonuniform with --rounds: every round scores equal layers; leave one out"
        )
    if targets_from(args).ffn_hidden_size is None:
        raise ConfigError(
            "--nonuniform: needs --ffn-hidden-size-remain, the FFN channels of a layer on average"
        )
    rules = Nonuniform(**given)
    if not 0 <= rules.floor <= 1:
        raise ConfigError(f"--nonuniform-floor {rules.floor}: is a share; wanted 0 to 1")
    return rules


def scores_from(args: argparse.Namespace, source: Source) -> Scores | None:
    """The scores that the flags choose to decide by, of this very model; None when by none.

    Raises:
        PlanError: no such criterion, or the scores of another model.
    """
    if args.scores is None:
        if args.criterion not in CRITERIA:
            raise ConfigError(
                f"--criterion {args.criterion}: without --scores only {', '.join(CRITERIA)}; make "
                "scores with `megatron-prune score`"
            )
        return None
    if args.criterion in CRITERIA:
        raise ConfigError(f"--scores with --criterion {args.criterion}, which needs none; name one")
    scores, found = load_scores(args.scores), source.digest
    if scores.source_digest != found:
        raise PlanError(
            f"--scores {args.scores}: of another model ({scores.source_digest[:12]}..., this one "
            f"is {found[:12]}...); score {source.path}"
        )
    return scores


def plan_from(args: argparse.Namespace, source: Source) -> PrunePlan:
    """The plan that the flags ask for.

    Raises:
        PlanError, ShapeError, CheckpointError: this model cannot be pruned so.
    """
    source.config.shape.check_uniform("plan", "prune its source anew")
    nonuniform = nonuniform_from(args)
    if nonuniform is not None:
        check_widths(source.config.family)
        if asks_for_search(args):
            raise ConfigError(
                "--nonuniform with a budget: a search looks at equal layers; take the FFN size it "
                "finds as --ffn-hidden-size-remain"
            )
    scores, targets = scores_from(args, source), targets_from(args)
    criterion = CRITERIA[args.criterion] if scores is None else scores.criterion(args.criterion)
    planner = partial(
        make_plan,
        source.config.shape,
        criterion=criterion,
        criterion_name=args.criterion,
        seed=args.seed,
        prune_type=args.prune_type,
        balance_for=options.balance_for(args, source),
        source_digest=source.digest,
        nonuniform=nonuniform,
    )
    if asks_for_search(args):
        targets = search_targets(args, source, criterion, planner, targets)
    plan = planner(targets)
    if scores is not None:
        axes = "DQKF" if targets.drop_layers else "DQKFL"  # layers that are named are no decision
        if text := rounding_text([*decisions(plan, scores.terms(args.criterion), axes)]):
            options.say(f"warning: {text}")
    return plan


def warn_not_loadable(config: ModelConfig) -> None:
    """Say, while it is cheap to change, that transformers will refuse this shape."""
    shape = config.shape
    hidden, heads = shape.hidden_size, shape.num_attention_heads
    if shape.ffn_per_layer is not None:
        also = "SGLang, TensorRT-LLM, llama.cpp and mlx-lm read it too"
        if not says_ffn_mult(shape):
            also = f"no other engine does, unless with --nonuniform-multiple {FFN_MULTIPLE}"
        options.say(
            f"warning: layers keep {min(shape.ffn_per_layer)} to {shape.ffn_hidden_size} FFN "
            "channels. LlamaForCausalLM of transformers and Megatron-LM do not load that; as a "
            "Nemotron-NAS model (DeciLMForCausalLM, --to hf) transformers and vLLM do, with "
            f"trust_remote_code; {also}. See docs/nonuniform.md"
        )
    elif config.family.hidden_multiple_of_heads and hidden % heads:
        near = " or ".join(
            str(n) for n in (hidden // heads * heads, -(-hidden // heads) * heads) if n
        )
        options.say(
            f"warning: hidden_size {hidden} is not a multiple of {heads} heads; transformers 5 "
            f"does not load such a {config.family} model, though head_dim is given. Nearest: {near}"
        )


def show_plan(source: Source, plan: PrunePlan) -> None:
    """Source and target side by side."""
    before, after = source.config, replace(source.config, shape=plan.target)
    options.show(f"{'':<22}{'source':>10}{'target':>10}")
    options.show(options.shape_table(plan.source, plan.target))
    warn_not_loadable(after)
    for what, cost in (("parameters (M)", count_parameters), ("bytes (MB)", weight_bytes)):
        options.show(f"{what:<22}{cost(before) / 1e6:>10.1f}{cost(after) / 1e6:>10.1f}")


def run(args: argparse.Namespace) -> None:
    targets = targets_from(args)  # what is malformed is refused before the source is opened
    nonuniform_from(args)
    check_search(args)
    check_rounds(args, has_target=asks_for_pruning(args))
    inputs = (*search_inputs(args), args.data)
    options.check_output_file(args.save, overwrite=args.overwrite, inputs=inputs)
    with options.opened(args.load, args.family) as source:
        if args.rounds is None:
            plan = plan_from(args, source)
        else:
            plan = plan_in_rounds(args, source, targets)
        show_plan(source, plan)
    if not args.dry_run and is_first_rank():
        replace_file(args.save, plan.to_json().encode())
