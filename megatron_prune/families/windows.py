"""Which layers of a Qwen2 or Qwen3 attend within a window only, as transformers 5 reads it.

``use_sliding_window`` switches ``sliding_window`` on; ``layer_types`` names each layer's kind, and
where it is missing the layers from ``max_window_layers`` on have the window
(configuration_qwen2.py, configuration_qwen3.py of transformers 5.23). Layers that are dropped move
the others' numbers, so both are written anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_prune.errors import CheckpointError

_FULL, _WINDOW = "full_attention", "sliding_attention"
_KINDS = {_FULL: _FULL, _WINDOW: _WINDOW, "attention": _FULL}  # the last as older files have it
DEFAULTS = {"sliding_window": 4096, "max_window_layers": 28}


def window_of(values: Mapping[str, Any]) -> int | None:
    """Tokens that a layer with a window reaches; None where no layer has one.

    Raises:
        CheckpointError: the keys contradict each other, or a layer is of another kind.
    """
    window = None
    if values.get("use_sliding_window"):
        window = values.get("sliding_window", DEFAULTS["sliding_window"])
    if values.get("layer_types") is None:
        first = values.get("max_window_layers", DEFAULTS["max_window_layers"])
        return window if first < values["num_hidden_layers"] else None
    if not any(windowed_layers(values)):
        return None
    if window is None:
        raise CheckpointError(
            f"layer_types has {_WINDOW}, but use_sliding_window "
            f"{values.get('use_sliding_window')!r} with sliding_window "
            f"{values.get('sliding_window')!r} says that there is no window; correct what is wrong"
        )
    return window


def windowed_layers(values: Mapping[str, Any]) -> list[bool]:
    """For each layer whether it would have the window that `window_of` says there is.

    Raises:
        CheckpointError: ``layer_types`` does not name a kind that we know for each layer.
    """
    kinds, layers = values.get("layer_types"), values["num_hidden_layers"]
    if kinds is None:
        first = values.get("max_window_layers", DEFAULTS["max_window_layers"])
        return [layer >= first for layer in range(layers)]
    if len(kinds) != layers:
        raise CheckpointError(
            f"layer_types names {len(kinds)} layers, num_hidden_layers says {layers}; one of the "
            "two belongs to another model"
        )
    if odd := sorted({str(kind) for kind in kinds} - set(_KINDS)):
        raise CheckpointError(f"layer_types has {odd[0]!r}; this reads {_FULL} and {_WINDOW}")
    return [_KINDS[kind] == _WINDOW for kind in kinds]


def keep_layers(values: Mapping[str, Any], kept: list[int]) -> dict[str, Any]:
    """The keys that say a layer's kind, such that every layer kept stays of its kind.

    Args:
        values: of the source, ``num_hidden_layers`` among them.
        kept: source numbers of the layers.
    """
    found: dict[str, Any] = {}
    if isinstance(values.get("layer_types"), list):
        found["layer_types"] = [values["layer_types"][layer] for layer in kept]
    if values.get("use_sliding_window"):
        windowed = windowed_layers(values)
        after = [windowed[layer] for layer in kept]
        if after == sorted(after):  # for those who do not read layer_types
            found["max_window_layers"] = after.count(False)
    return found
