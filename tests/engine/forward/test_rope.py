"""Rotary frequencies are transformers', and what we do not compute is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_prune.engine.forward.rope import inverse_frequencies, rope_kind
from megatron_prune.errors import ConfigError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.5},
        LLAMA3,
        {**LLAMA3, "factor": 32.0},
        {**LLAMA3, "low_freq_factor": 1.5, "high_freq_factor": 3.0},
        {**LLAMA3, "original_max_position_embeddings": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize(("width", "base"), [(8, 50000.0), (64, 10000.0), (128, 500000.0)])
def test_frequencies_are_transformers(scaling: dict[str, Any], width: int, base: float) -> None:
    config = LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width,
        max_position_embeddings=16384, rope_parameters={**scaling, "rope_theta": base},
    )  # fmt: skip
    wanted, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    assert attention_factor == 1.0
    assert torch.equal(inverse_frequencies(width, base, scaling), wanted)
    assert not torch.equal(inverse_frequencies(width, base), wanted)


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "yarn"),
        ({"type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"rope_type": "linear"}, "factor is None"),
        ({**LLAMA3, "high_freq_factor": 0.5}, "not above low_freq_factor"),
        ({**LLAMA3, "factor": "8"}, "factor is '8'"),
    ],
)
def test_unusable_scaling_is_refused(scaling: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        rope_kind(scaling)
