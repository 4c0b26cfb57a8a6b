"""Count a corpus's tokens of a model with tiktoken ranks, and choose those that remain."""

from __future__ import annotations

import sys

from emb_pruner.doors import get_vocab_freq

if __name__ == "__main__":
    sys.exit(get_vocab_freq(__doc__, "--model_name_or_path", 30000))
