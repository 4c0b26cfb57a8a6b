"""Vocabulary pruning: a smaller tokenizer, and the rows of its tokens, in three steps.

  megatron-prune vocab count --tokenizer llama --input corpus.jsonl --save counts.npz
  megatron-prune vocab plan --tokenizer llama --counts counts.npz --vocab-size-remain 16384 \\
      --save vocab_plan.json
  megatron-prune vocab prune --load llama --plan vocab_plan.json --save llama-16k --to hf

Each has a file of its own, vocab_count.py and so on, and its own --help.
"""

from __future__ import annotations

import argparse

ACTIONS = {
    "count": "how often a corpus has each token",
    "plan": "decide which tokens stay, and write it down",
    "prune": "cut tokenizer, embedding and output layer as the plan says",
}


def parser() -> argparse.ArgumentParser:
    """Of the word after ``vocab``."""
    found = argparse.ArgumentParser(
        prog="megatron-prune vocab",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="actions:\n" + "\n".join(f"  {name:<11} {text}" for name, text in ACTIONS.items()),
        allow_abbrev=False,
    )
    found.add_argument("action", choices=ACTIONS, metavar="ACTION", help="one of those below")
    return found
