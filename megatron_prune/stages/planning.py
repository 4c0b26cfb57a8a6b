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

Every target is optional; what is not named is kept whole, or with a budget as large as fits. The
command reads a few values of the source to fingerprint it, and without --scores, whose maker has
done so, every weight once to see that it is a number; --evaluate-data runs the pruned models, and
--rounds scores the model again as it shrinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_prune.files import replace_file
from megatron_prune.model.shape import ModelConfig
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.ranks import is_first_rank
from megatron_prune.stages.common import check_output_file, opened
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.deciding import decide, plan_table, warn_not_loadable
from megatron_prune.stages.reading import check_weights
from megatron_prune.stages.rounds import RoundFlags, plan_in_rounds
from megatron_prune.stages.searching import SearchFlags, search_targets


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RoundFlags, SearchFlags):
    pass


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What is kept of a model; as text, source and target side by side."""

    plan: PrunePlan
    source: ModelConfig

    def __str__(self) -> str:
        return plan_table(self.source, self.plan)


def plan(options: PlanOptions, console: Console = SILENT) -> Planned:
    """The plan that the options ask for, written to ``save`` unless it is a dry run.

    Raises:
        ConfigError: options that do not go together, or files that are not there.
        PlanError, ShapeError, CheckpointError: this model cannot be pruned so.
    """
    targets = options.targets  # what is malformed is refused before the source is opened
    searches = options.asks_for_search()
    if searches:
        options.check_search()
    options.check_rounds(searches=searches)
    options.check_nonuniform()
    check_output_file(
        options.save, overwrite=options.overwrite, inputs=(*options.inputs, options.data)
    )
    search = partial(search_targets, options, console) if searches else None
    with opened(options.load, options.family) as source:
        if options.rounds is None:
            if options.scores is None:  # else `score` has looked at every weight
                check_weights(source, console, allow=options.allow_nonfinite)
            found = decide(options, source, console, search)
        else:
            found = plan_in_rounds(options, source, targets, console)
    warn_not_loadable(source.config, found, console)
    if not options.dry_run and is_first_rank():
        replace_file(options.save, found.to_json().encode())
    return Planned(plan=found, source=source.config)
