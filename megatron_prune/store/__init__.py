"""Checkpoints on disk: open any of them as a `Source`, write any of them with a `Writer`."""

from megatron_prune.store.open import CheckpointFacts, open_source, read_facts

__all__ = ["CheckpointFacts", "open_source", "read_facts"]
