"""Rotary frequencies, plain and scaled, as transformers computes them.

Megatron-Core's own scaling fixes three of Llama 3's four parameters; these honour all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_prune.errors import ConfigError

KINDS = ("default", "linear", "llama3")


def rope_kind(scaling: Mapping[str, Any] | None) -> str:
    """The kind of scaling, checked: one of `KINDS`, all its parameters there and sensible.

    Raises:
        ConfigError: a kind or a parameter that cannot be used.
    """
    if not scaling:
        return "default"
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in KINDS:
        raise ConfigError(
            f"rope scaling {kind!r} is not implemented in the engine; wanted one of "
            f"{', '.join(KINDS)} (converting and pruning carry it along all the same)"
        )
    wanted = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}[kind]
    for name in wanted:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(f"rope scaling {kind}: {name} is {value!r}; wanted a positive number")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ConfigError(
            f"rope scaling llama3: high_freq_factor {scaling['high_freq_factor']} is not above "
            f"low_freq_factor {scaling['low_freq_factor']}"
        )
    return str(kind)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def inverse_frequencies(
    kv_channels: int, base: float, scaling: Mapping[str, Any] | None = None
) -> Tensor:
    """The angle a position adds to each pair of channels.

    Returns:
        [kv_channels / 2] float32.

    Raises:
        ConfigError: see `rope_kind`.
    """
    kind = rope_kind(scaling)
    exponents = torch.arange(0, kv_channels, 2, dtype=torch.int64).float() / kv_channels
    frequencies = 1.0 / (base**exponents)
    if kind == "default" or scaling is None:
        return frequencies
    if kind == "linear":
        return frequencies / scaling["factor"]
    return _llama3(frequencies, *(scaling[name] for name in _LLAMA3))


def _llama3(
    frequencies: Tensor, factor: float, low: float, high: float, original_positions: float
) -> Tensor:
    """Llama 3.1: long waves slowed down by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / frequencies
    slowed = torch.where(wavelength > original_positions / low, frequencies / factor, frequencies)
    smooth = (original_positions / wavelength - low) / (high - low)
    blended = (1 - smooth) * slowed / factor + smooth * slowed
    between = (wavelength >= original_positions / high) & (wavelength <= original_positions / low)
    return torch.where(between, blended, slowed)
