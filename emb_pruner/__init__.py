"""Vocabulary pruning: which tokens a tokenizer keeps, its files, and old ids to new ones.

The embedding and output rows follow through `megatron_prune`'s surgery on axis V.
"""
