"""What holds for all tests: one thread a process, and nothing from a model hub."""

from __future__ import annotations

import os

# Before torch is imported: tests run side by side and start ranks of their own, and more threads
# than cores make a collective wait for a rank that is not running.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
