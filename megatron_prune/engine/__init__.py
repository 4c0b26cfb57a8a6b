"""The Megatron runtime: the only package that imports ``megatron.core``.

One code path for NCCL with Transformer Engine and for gloo on a CPU (`cpu` has what the latter
needs). Nothing here knows about pruning.
"""
