"""A model's fingerprint: tells two models of one shape apart, whatever they are stored in."""

from __future__ import annotations

import hashlib
import json

import torch

from megatron_prune.model.axes import axes_of, names, split_dim, split_layer
from megatron_prune.sources.source import Source

_SAMPLE = 64  # values taken at each of two places of a split tensor


def source_digest(source: Source) -> str:
    """SHA-256 over the shape and samples of every tensor, as float32.

    Norms and replicated biases count whole; of a tensor that tensor parallelism splits, the first
    values at its first and its middle index. That is a few kB per layer of any model, so it costs
    page faults, not a read of the checkpoint, and it does not depend on format, layout, padding or
    fusing. Two models that agree in all of these places have the same digest.
    """
    hashed = hashlib.sha256(json.dumps(source.config.shape.as_dict()).encode())
    for name in names(source.config):
        axes = axes_of(name)
        dim = split_dim(axes)
        middle = (
            0 if dim is None else source.config.shape.size(axes[dim], split_layer(name)[0]) // 2
        )
        for at in sorted({0, middle}):
            x = source.read(name) if dim is None else source.read(name, at, at + 1)
            sample = x if dim is None else x[:1].reshape(-1)[:_SAMPLE]
            hashed.update(sample.to(torch.float32).contiguous().numpy().tobytes())
    return hashed.hexdigest()
