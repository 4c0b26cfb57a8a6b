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
from collections.abc import Mapping, Sequence

from megatron_prune import __version__, stages
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
ACTIONS = {
    "count": "how often a corpus has each token",
    "plan": "decide which tokens stay, and write it down",
    "prune": "cut tokenizer, embedding and output layer as the plan says",
}
_VOCAB = """Vocabulary pruning: a smaller tokenizer, and the rows of its tokens, in three steps.

  megatron-prune vocab count --tokenizer llama --input corpus.jsonl --save counts.npz
  megatron-prune vocab plan --tokenizer llama --counts counts.npz --vocab-size-remain 16384 \\
      --save vocab_plan.json
  megatron-prune vocab prune --load llama --plan vocab_plan.json --save llama-16k --to hf

Each step has a --help of its own."""


def _chosen(argv: Sequence[str], prog: str, about: str, what: str, of: Mapping[str, str]) -> str:
    """The first word, which names one of the lines of ``of``."""
    lines = "\n".join(f"  {name:<11} {text}" for name, text in of.items())
    parser = argparse.ArgumentParser(
        prog=prog,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{what}s:\n{lines}",
        allow_abbrev=False,
    )
    if of is STAGES:
        parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(what, choices=of, metavar=what.upper(), help="one of those below")
    return str(getattr(parser.parse_args(argv[:1]), what))


def _stage(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The stage's name, such as ``prune`` or ``vocab prune``, and the arguments after it."""
    about = "Prune large language models on their tensor- and pipeline-parallel shards."
    stage = _chosen(argv, "megatron-prune", about, "stage", STAGES)
    if stage != "vocab":
        return stage, argv[1:]
    action = _chosen(argv[1:], "megatron-prune vocab", _VOCAB, "action", ACTIONS)
    return f"{stage} {action}", argv[2:]


def _run(stage: str, argv: Sequence[str], command: Sequence[str]) -> None:
    """Parse, do, and print what came of it.

    Args:
        command: what was typed, for stages that record it.
    """
    name = stage.replace(" ", "_")
    module = importlib.import_module(f"megatron_prune.stages.{stages.MODULES[name]}")
    options_type = getattr(module, stages.options_name(name))
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
    options = options_from(args, options_type, command=tuple(command))
    found = getattr(module, name)(options, terminal)
    if found is not None:
        terminal.show(str(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        stage, rest = _stage(argv)
        _run(stage, rest, argv)
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
