"""``megatron-prune STAGE``: flags from the options of a stage, under Megatron's names.

Dashes and underscores are the same; ``--config recipe.yaml`` is flags written as YAML, and a flag
on the command line wins over the recipe. Results go to standard output, everything else to
standard error, from rank 0 only. Exit codes are those of ``errors``.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

from megatron_prune import __version__, stages
from megatron_prune.cli.flags import add_flags, options_from
from megatron_prune.cli.recipe import expand_recipe, with_dashes
from megatron_prune.cli.start import alike, check_launcher, refusal_told, started_with
from megatron_prune.cli.terminal import Terminal
from megatron_prune.errors import PruneError, exit_code
from megatron_prune.model.grid import Layout
from megatron_prune.ranks import is_first_rank

STAGES = {
    "inspect": "what a checkpoint is: format, family, shape, layout",
    "convert": "Hugging Face <-> Megatron, any TP and PP, without loss",
    "score": "what each head, channel and layer is worth",
    "profile": "how long a layer takes on this machine",
    "plan": "decide what is kept, and write it down",
    "prune": "cut the checkpoint as the plan says",
    "sparsify": "set weights to zero in one shot: Wanda, SparseGPT and after",
    "reshard": "change TP, PP or the format of a Megatron checkpoint",
    "verify": "check every tensor of a pruned checkpoint against source and plan",
    "vocab": "a smaller tokenizer with its rows: count, plan, prune",
    "preprocess": "text to Megatron's .bin/.idx",
    "shear": "learn what to prune: masks trained with the weights to a target shape",
    "train": "continued pretraining, from any checkpoint",
    "evaluate": "loss, perplexity, bits per byte",
    "generate": "continue a prompt, from any checkpoint",
    "report": "scores, plans, training runs and judged models, as one page",
}


VOCAB = {
    "count": "how often a corpus has each token",
    "plan": "decide which tokens stay, and write it down",
    "prune": "cut tokenizer, embedding and output layer as the plan says",
}
_ABOUT = "Prune large language models on their tensor- and pipeline-parallel shards."
_ABOUT_VOCAB = """Prune the vocabulary in three steps: a smaller tokenizer, and its tokens' rows.

  megatron-prune vocab count --tokenizer llama --input corpus.jsonl --save counts.npz
  megatron-prune vocab plan --tokenizer llama --counts counts.npz --vocab-size-remain 16384 \\
      --save vocab_plan.json
  megatron-prune vocab prune --load llama --plan vocab_plan.json --save llama-16k --to hf

Each of them has its own --help.
"""


def _parser(words: str, about: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"megatron-prune {words}".strip(),
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _word_parser(
    words: str, about: str, what: str, choices: dict[str, str]
) -> argparse.ArgumentParser:
    """Of one more word, ``what``, after ``words``."""
    parser = _parser(words, about)
    rows = (f"  {name:<11} {text}" for name, text in choices.items())
    parser.epilog = "\n".join([f"{what}s:", *rows])
    parser.add_argument(what, choices=choices, metavar=what.upper(), help="one of those below")
    return parser


def _stage(argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The stage's name, such as ``prune`` or ``vocab prune``, and the arguments after it."""
    parser = _word_parser("", _ABOUT, "stage", STAGES)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    stage = parser.parse_args(argv[:1]).stage
    if stage != "vocab":
        return stage, argv[1:]
    action = _word_parser("vocab", _ABOUT_VOCAB, "action", VOCAB).parse_args(argv[1:2]).action
    return f"{stage} {action}", argv[2:]


def stage_parser(stage: str) -> tuple[argparse.ArgumentParser, Callable[..., Any], type]:
    """The parser of a stage such as ``vocab prune``, its function and the class of its options."""
    function = getattr(stages, stage.replace(" ", "_"))
    options = getattr(stages, f"{stage.title().replace(' ', '')}Options")
    parser = _parser(stage, sys.modules[function.__module__].__doc__)
    add_flags(parser, options)
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of these same flags")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, function, options


def _run(argv: Sequence[str]) -> None:
    """Parse, do, and print what came of it."""
    check_launcher()
    stage, rest = _stage(argv)
    parser, function, options = stage_parser(stage)
    with refusal_told(issubclass(options, Layout)):
        args = parser.parse_args(expand_recipe(stage, with_dashes(rest)))
        given: Any = options_from(args, options, command=tuple(argv))
    terminal = Terminal()
    with (
        terminal.warnings(),
        nullcontext()
        if not _on_ranks(given)
        else alike(started_with(stage, given), getattr(given, "distributed_timeout_minutes", 10)),
    ):
        found = function(given, terminal)
    if found is not None:
        terminal.show(str(found))


def _on_ranks(options: Any) -> bool:
    """Whether ranks share the stage: what takes a layout, unless nothing is run or written."""
    serial = getattr(options, "dry_run", False) or getattr(options, "rounds", 1) is None
    return isinstance(options, Layout) and not serial


def main(argv: Sequence[str] | None = None) -> int:
    """Run one stage; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        _run(argv)
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
