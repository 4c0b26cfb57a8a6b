"""Model families, one file each, and which of them a config.json is of."""

from __future__ import annotations

from pathlib import Path

from megatron_prune.errors import CheckpointError
from megatron_prune.families.llama import LLAMA
from megatron_prune.families.mistral import MISTRAL
from megatron_prune.families.nemotron_nas import NEMOTRON_NAS
from megatron_prune.families.qwen1 import QWEN1
from megatron_prune.families.qwen2 import QWEN2
from megatron_prune.families.qwen3 import QWEN3
from megatron_prune.model.family import Family
from megatron_prune.model.shape import ModelConfig
from megatron_prune.parsing import checked_as, read_table

FAMILIES = {family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}
_ON_DISK = {family.model_type: family for family in (*FAMILIES.values(), QWEN1, NEMOTRON_NAS)}


def on_disk(model_type: object) -> Family | None:
    """The family as a config.json's ``model_type`` names it; None for one that we do not know."""
    return _ON_DISK.get(model_type) if isinstance(model_type, str) else None


def read_config(path: Path) -> ModelConfig:
    """The model's facts from a config.json.

    Raises:
        CheckpointError: not JSON, a family we do not know, or sizes that do not fit.
    """
    return read_config_as(path)[0]


def read_config_as(path: Path) -> tuple[ModelConfig, Family]:
    """The model's facts, and the family that says how its tensors lie beside the config.json.

    Raises:
        CheckpointError: see `read_config`.
    """
    values = read_table(path, CheckpointError, "not a model configuration")
    family = on_disk(values.get("model_type"))
    if family is None:
        known = ", ".join(_ON_DISK)
        raise CheckpointError(
            f"{path}: model_type {values.get('model_type')!r}; wanted one of {known}"
        )
    with checked_as(CheckpointError, path, "not a model configuration"):
        return family.read(values), family


def family_of_arguments(*, qkv_bias: bool, all_bias: bool, window: bool, qk_norm: bool) -> Family:
    """The family that a stock checkpoint's arguments look most like."""
    like = [family for family in FAMILIES.values() if family.has_qk_norm == qk_norm]
    wanted = (window, qkv_bias and not all_bias and not window)
    exact = [one for one in like if (one.has_windows, one.always_qkv_bias) == wanted]
    return (exact or like or [LLAMA])[0]
