"""Keys of config.json that make another model of it than the one its sizes describe.

Each is refused by name before a weight is looked at: without it the rest reads like a plain model.
What transformers 5 does with them is in docs/reading.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import CheckpointError

DEQUANTISE = (
    "prune the model that it was made of and quantise the result, or write it in bf16 first "
    "(transformers: model.dequantize(), then save_pretrained)"
)
_UNREAD = {
    "quantization_config": f"a quantised model; {DEQUANTISE}",
    "quantization": f"a quantised model (MLX); {DEQUANTISE}",
    "compression_config": f"a compressed model; {DEQUANTISE}",
    "per_layer_config": "sizes of their own in some layers; this reads one size for all",
    "configuration_files": "the configuration is in other files; give the right one this name",
    "text_config": "a model within a model; export its language model by itself",
    "transformers_weights": "another file with the weights; rename it and remove this key",
}


def check_keys(values: Mapping[str, Any]) -> None:
    """Refuse a configuration that has one of these keys with a value.

    Raises:
        CheckpointError: with the key, its value and what to do.
    """
    for key, meaning in _UNREAD.items():
        if values.get(key):
            raise CheckpointError(f"{key} {_said(values[key])}: {meaning}")
    rope = values.get("rope_scaling") or values.get("rope_parameters")
    for key, place in (("at the top", values), ("of rope", rope)):
        if isinstance(place, Mapping) and place.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(
                f"partial_rotary_factor {place['partial_rotary_factor']!r} {key}: wanted 1.0; "
                "transformers 5 does not rotate part of a head in this family"
            )


def _said(value: Any) -> str:
    """A value in a few words; of a quantisation its method."""
    method = (
        value.get("quant_method") or value.get("format") if isinstance(value, Mapping) else None
    )
    text = repr(method or value)
    return text if len(text) < 60 else f"{text[:60]}..."
