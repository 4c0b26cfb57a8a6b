"""``megatron-prune STAGE``: one small file per stage, Megatron's flag names.

Dashes and underscores are the same; ``--config recipe.yaml`` is flags written as YAML, and a flag
on the command line wins over the recipe. Results go to standard output, everything else to
standard error, from rank 0 only. Exit codes are those of ``errors``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from megatron_prune import __version__
from megatron_prune.cli import vocab
from megatron_prune.cli.flags import add_flags, options_from
from megatron_prune.cli.recipe import expand_recipe, with_dashes
from megatron_prune.cli.terminal import Terminal
from megatron_prune.errors import PruneError, exit_code
from megatron_prune.ranks import is_first_rank

STAGES = {
    "inspect": "what a checkpoint is: format, family, shape, layout",
    "convert": "Hugging Face <-> Megatron, any TP and PP, without loss",
    "score": "what each head, channel and layer is worth",
    "profile": "how long a layer takes on this machine",
    "plan": "decide what is kept, and write it down",
    "prune": "cut the checkpoint as the plan says",
    "reshard": "change TP, PP or the format of a Megatron checkpoint",
    "verify": "check every tensor of a pruned checkpoint against source and plan",
    "vocab": "a smaller tokenizer with its rows: count, plan, prune",
    "preprocess": "text to Megatron's .bin/.idx",
    "train": "continued pretraining, from any checkpoint",
    "evaluate": "loss, perplexity, bits per byte",
    "generate": "continue a prompt, from any checkpoint",
    "report": "scores, plans, training runs and judged models, as one page",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-prune",
        description="Prune large language models on their tensor- and pipeline-parallel shards.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="stages:\n" + "\n".join(f"  {name:<11} {text}" for name, text in STAGES.items()),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("stage", choices=STAGES, metavar="STAGE", help="one of those below")
    return parser


def _stage(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The stage's name, such as ``prune`` or ``vocab prune``, and the arguments after it."""
    stage = _parser().parse_args(argv[:1]).stage
    if stage != "vocab":
        return stage, argv[1:]
    action = vocab.parser().parse_args(argv[1:2]).action
    return f"{stage} {action}", argv[2:]


# command -> the module of its stage, its options and its function, where they are in `stages`
_DOORS = {
    "inspect": ("inspection", "InspectOptions", "inspect"),
    "reshard": ("resharding", "ReshardOptions", "reshard"),
}


def _run_stage(stage: str, argv: Sequence[str]) -> None:
    """Parse, do, and print what came of it."""
    module_name, options_name, function_name = _DOORS[stage]
    module = importlib.import_module(f"megatron_prune.stages.{module_name}")
    options_type = getattr(module, options_name)
    parser = argparse.ArgumentParser(
        prog=f"megatron-prune {stage}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_flags(parser, options_type)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of these same flags")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(expand_recipe(stage, with_dashes(argv)))
    terminal = Terminal()
    found = getattr(module, function_name)(options_from(args, options_type), terminal)
    if found is not None:
        terminal.show(str(found))


def _stage_arguments(stage: str, argv: Sequence[str]) -> tuple[object, argparse.Namespace]:
    module = importlib.import_module(f"megatron_prune.cli.{stage.replace(' ', '_')}")
    parser = argparse.ArgumentParser(
        prog=f"megatron-prune {stage}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of these same flags")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return module, parser.parse_args(expand_recipe(stage, with_dashes(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        stage, rest = _stage(argv)
        if stage in _DOORS:
            _run_stage(stage, rest)
            return 0
        module, args = _stage_arguments(stage, rest)
        args.argv = argv  # for stages that record what was asked of them
        module.run(args)  # type: ignore[attr-defined]
    except PruneError as error:
        return _tell(error, exit_code(error), debug)
    except BrokenPipeError:  # the reader of our output left, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python flushes again
        return 141
    except OSError as error:
        return _tell(error, exit_code(error), debug)
    except KeyboardInterrupt:
        return 130
    return 0


def _tell(error: Exception, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    if is_first_rank():
        print(f"megatron-prune: error: {error}", file=sys.stderr)
    elif debug or code == 5:
        print(f"megatron-prune: rank {os.environ['RANK']}: {error}", file=sys.stderr)
    return code
