"""Prune a model with tiktoken ranks to the ids of a remain_vocab_ids.pt."""

from __future__ import annotations

import sys

from emb_pruner.doors import prune_tokenizer_and_emb

if __name__ == "__main__":
    sys.exit(prune_tokenizer_and_emb(__doc__))
