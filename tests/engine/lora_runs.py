"""What a run with low-rank factors leaves, read by torch, and merged by plain indexing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.pico import make_model

FLAGS = ("--lora-rank", 4, "--lora-alpha", 8, "--lr", "1e-2")
HEADS, GROUPS, WIDTH = 6, 3, 8  # of the pico model "gqa"
_MODULES = {
    "linear_qkv": "self_attention", "linear_proj": "self_attention", "linear_fc1": "mlp",
    "linear_fc2": "mlp",
}  # fmt: skip


def make_sparse(folder: Path) -> Path:
    """A model whose linears' weights are zero one time in two."""
    from safetensors.torch import load_file, save_file

    make_model(folder, "gqa")
    values, chosen = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, x in values.items():
        if "proj" in name:
            x[torch.rand(x.shape, generator=chosen) < 0.5] = 0
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def stored(save: Path, iteration: int) -> dict[str, Tensor]:
    """Every tensor of the model as it lies in a checkpoint, by torch's own reader."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    path = save / f"iter_{iteration:07d}"
    listed = FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in listed.items()
        if isinstance(entry, TensorStorageMetadata) and not key.startswith("optimizer")
    }
    load(state, checkpoint_id=path, no_dist=True)
    return state


def optimizer_keys(save: Path, iteration: int) -> set[str]:
    """The parameters that the optimizer has state of."""
    from torch.distributed.checkpoint import FileSystemReader

    listed = FileSystemReader(save / f"iter_{iteration:07d}").read_metadata().state_dict_metadata
    return {key.split(".", 3)[-1] for key in listed if key.startswith("optimizer.state.exp_avg.")}


def factors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x for key, x in state.items() if "lora_" in key}


def deltas(factors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Hugging Face's name of each adapted weight -> what is added to it; differentiable.

    Knows the order of rows in Megatron's fused linears: per group its query heads, key, value;
    gate above up.
    """
    per_group = HEADS // GROUPS + 2
    rows: dict[str, list[int]] = {"q": [], "k": [], "v": []}
    for row in range(GROUPS * per_group * WIDTH):
        place = row // WIDTH % per_group
        rows["q" if place < per_group - 2 else "k" if place == per_group - 2 else "v"].append(row)
    found = {}
    for target, module in _MODULES.items():
        key = f"decoder.layers.{module}.{target}"
        if f"{key}.lora_A" not in factors:
            continue
        for layer, (a, b) in enumerate(zip(factors[f"{key}.lora_A"], factors[f"{key}.lora_B"])):
            whole, at = scale * (b @ a), f"model.layers.{layer}"
            half = len(whole) // 2
            if target == "linear_qkv":
                parts = {f"self_attn.{c}_proj": whole[rows[c]] for c in "qkv"}
            elif target == "linear_fc1":
                parts = {"mlp.gate_proj": whole[:half], "mlp.up_proj": whole[half:]}
            else:
                name = {"linear_proj": "self_attn.o_proj", "linear_fc2": "mlp.down_proj"}[target]
                parts = {name: whole}
            found |= {f"{at}.{name}.weight": x for name, x in parts.items()}
    return found
