"""Count a corpus's tokens of a SentencePiece model, and choose those that remain."""

from __future__ import annotations

import sys

from emb_pruner.doors import get_vocab_freq

if __name__ == "__main__":
    sys.exit(get_vocab_freq(__doc__, "--spm", 20000))
