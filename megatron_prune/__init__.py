"""megatron_prune: prune large language models on their tensor- and pipeline-parallel shards."""

__version__ = "0.1.0"
