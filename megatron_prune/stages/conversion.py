"""Convert a checkpoint between Hugging Face and Megatron, at any TP and PP, without loss.

  megatron-prune convert --load llama --save llama-tp8 --to megatron --tensor-model-parallel-size 8
  megatron-prune convert --load llama-tp8 --save llama-hf --to hf
  megatron-prune convert --load llama --save llama-rotated --to hf --rotate --data calibration.jsonl

Under torchrun the ranks share the files; the result is the same. Of a training run the model is
written, without optimizer, schedule and iteration; reshard keeps those.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_prune.sources.source import Source
from megatron_prune.stages.common import check_save, opened
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.rotating import Rotation, rotated, unrotated
from megatron_prune.stages.sparse_input import tell_zeros_gone
from megatron_prune.stages.targeting import Targeted
from megatron_prune.stages.writing import Written, tell_dropped, write
from megatron_prune.surgery import Target, make_writer


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Rotation, Targeted):
    pass


def convert(options: ConvertOptions, console: Console = SILENT) -> Written:
    """Write a checkpoint in another format or layout, or in another basis; see `write`.

    Raises:
        ConfigError: options that do not go together, or an output that holds the input.
    """
    target = options.target
    check_save(options.save, options.load, overwrite=options.overwrite)
    options.check_rotation()
    options.check_publishing(options.to)
    with opened(options.load, options.family) as source:
        tell_dropped(source, console)
        written = _convert(options, source, target, console)
    return options.publish(written, console)


def _convert(options: ConvertOptions, source: Source, target: Target, console: Console) -> Written:
    if not options.rotate:
        return write("convert", options, options.cast(source), target, console)
    tell_zeros_gone(source, console)
    same = options.cast(unrotated(source))
    make_writer(same, target)  # refuses what cannot be written, before the calibration
    if options.dry_run:
        return write("convert", options, same, target, console)
    with rotated(options, source, console) as found:
        out = options.cast(found.source)
        return write("convert", options, out, target, console, ranks=found.ranks)
