"""Cut a model to the tokens of a plan: tokenizer files, embedding and output layer together.

  megatron-prune vocab prune --load llama --plan vocab_plan.json --save llama-16k --to hf
  torchrun --nproc-per-node 8 -m megatron_prune vocab prune --load llama-tp8 \\
      --plan vocab_plan.json --save llama-16k-tp8 --to megatron --tensor-model-parallel-size 8

The command streams as prune does, from and to any format and layout. All token ids in config.json
and generation_config.json follow; plan.json and vocab_plan.json beside the weights say which tokens
stayed. With heads, channels or layers in the same pass: prune --vocab-plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_prune.flags import flag
from megatron_prune.stages.common import check_save, opened
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.pruning import write_pruned
from megatron_prune.stages.targeting import Targeted
from megatron_prune.stages.vocabulary import cut_vocabulary
from megatron_prune.stages.writing import Written


@dataclass(frozen=True, kw_only=True)
class VocabPruneOptions(Targeted):
    plan: Path = flag("of `megatron-prune vocab plan`", metavar="PLAN")
    tokenizer: Path | None = flag(
        "of a source that carries none",
        default=None,
        metavar="PATH",
        also=("--vocab-tokenizer",),
    )


def vocab_prune(options: VocabPruneOptions, console: Console = SILENT) -> Written:
    """Write the model with the rows of the plan's tokens, and their tokenizer; see `write`.

    Raises:
        ConfigError: options that do not go together, or an output that holds the input.
        PlanError: another tokenizer or model.
    """
    target = options.target
    check_save(options.save, options.load, overwrite=options.overwrite)
    options.check_publishing(options.to)
    with (
        opened(options.load, options.family) as source,
        cut_vocabulary(options.plan, options.tokenizer, source, None) as cut,
    ):
        written = write_pruned(options, target, source, cut, console)
    return options.publish(written, console)
