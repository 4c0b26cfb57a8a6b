"""Let any checkpoint continue a text, for a quick look at what the model says.

  megatron-prune generate --load /ckpt/pruned --prompt "The capital of France is"
  torchrun --nproc-per-node 3 -m megatron_prune generate --load /ckpt/recovered \\
      --tensor-model-parallel-size 3 --prompt-file question.txt --chat --temperature 0.7

The choice is greedy unless a temperature is given. Every new token costs a pass over the whole
text: that is fine for a look at a few sentences, not for serving.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError
from megatron_prune.evaluate.options import GenerateOptions
from megatron_prune.stages.common import give_one
from megatron_prune.stages.console import SILENT, Console

if TYPE_CHECKING:
    from megatron_prune.evaluate.generation import Generation


def generate(options: GenerateOptions, console: Console = SILENT) -> Generation:
    """The continuation of a prompt, on every rank.

    Raises:
        ConfigError: no prompt or two, or an option that is out of range or does not fit the model.
        ShapeError: the layout does not fit the model or the processes.
        CheckpointError: there is no model at ``load``.
    """
    from megatron_prune.engine.groups import data_parallel_size, model_parallel, world_size

    options.check()
    prompt = _prompt(options)
    data_parallel_size(options.grid, world_size())
    from megatron_prune.evaluate import generation

    source = generation.open_for_generation(options)
    began = time.monotonic()
    with model_parallel(
        options.grid, timeout_minutes=options.distributed_timeout_minutes
    ) as groups:
        found = generation.generate(
            source,
            options,
            prompt,
            groups,
            lambda: console.bar("", unit="token", stays=False),
        )
    why = "the model ended it" if found.is_ended else "--max-new-tokens reached"
    console.say(f"{len(found.tokens)} tokens in {time.monotonic() - began:.1f} s; {why}")
    return found


def _prompt(options: GenerateOptions) -> str:
    give_one(options, "prompt", "prompt_file")
    if options.prompt_file is None:
        return options.prompt or ""
    try:
        return options.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--prompt-file {options.prompt_file}: {error}; wanted a text in UTF-8"
        ) from None
