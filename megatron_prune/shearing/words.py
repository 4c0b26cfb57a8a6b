"""What a run of `shear` calls what it leaves, for those who write it and those who read it."""

from __future__ import annotations

MASKS = "masks"  # our key in the training state of a checkpoint
MASK_SCORES = "mask_scores.safetensors"  # beside the run's plan
GATES = "gates"  # the criterion of those scores, and of the plan
EXPECTED, TARGET = "expected sparsity", "target sparsity"  # in metrics, before a word of `AXES`
MULTIPLIERS = ("lambda 1", "lambda 2", "lambda 3")  # likewise
UNDECIDED = "share undecided"  # likewise: of units that neither stay nor go with 95%
BY_LAYER = "share gone by layer"  # in metrics: word of `AXES` -> a share a layer
