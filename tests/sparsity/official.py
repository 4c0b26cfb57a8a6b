"""A model made sparse layer by layer with our methods, and what the official code makes of it.

``data/`` holds a small trained model and, by method and pattern, the masks (and some weights) that
locuslab/wanda at 8e8fc87 gives for it, in float32 with the windows of ``statistics.safetensors``.
Files ``*.mean.safetensors`` have every window counted alike where that code counts the k-th 1 / k.
``NAME.kept`` is a bit a weight, row by row, 1 for kept; ``NAME`` the kept weights, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from megatron_prune.solve.kselect import ALONE
from megatron_prune.sparsity.method import Asked, How, Inputs, Method, Pattern, Sparse, method_for

DATA = Path(__file__).parent / "data"
MODEL = DATA / "llama"
SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def asked_of(pattern: str) -> Asked:
    """``0.5``, or ``2:4``."""
    if ":" not in pattern:
        return Asked(share=float(pattern))
    found = Pattern.parse(pattern)
    return Asked(share=1 - found.keep / found.group, pattern=found)


def prune_alone(
    method: Method, how: How, weights: list[Tensor], inputs: Inputs, asked: Asked
) -> list[Sparse]:
    prepared = {} if method.needs == "weights" else method.prepare(inputs, how)
    return method.prune(weights, prepared, asked, how, ALONE)


def official(label: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks of what is kept, and values of the matrices that have them, by name."""
    raw, source = load_file(DATA / f"{label}.safetensors"), load_file(MODEL / "model.safetensors")
    kept, values = {}, {}
    for name in (key[:-5] for key in raw if key.endswith(".kept")):
        bits = np.unpackbits(raw[f"{name}.kept"].numpy())[: source[name].numel()]
        kept[name] = torch.from_numpy(bits.astype(bool)).view_as(source[name])
        if name in raw:
            values[name] = torch.zeros_like(source[name])
            values[name][kept[name]] = raw[name]
    return kept, values


@torch.no_grad()
def sparsified(
    method: str,
    pattern: str,
    how: How | None = None,
    upstream_statistics: bool = False,
) -> tuple[dict[str, Tensor], int]:
    """The matrices of all layers, each layer pruned with inputs from those before it, by name; and
    how many decisions were close."""
    how = how or How()
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    windows = load_file(DATA / "statistics.safetensors")["windows.calibration"].long()
    done, close = {}, 0
    for number, layer in enumerate(network.model.layers):
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
        observed = _observe(network, linears, windows, upstream_statistics)
        for names in _sharing(linears):
            weights = [linears[name].weight.data.clone() for name in names]
            inputs = observed[names[0]]
            found = prune_alone(method_for(method, how), how, weights, inputs, asked_of(pattern))
            for name, each in zip(names, found):
                linears[name].weight.data = each.weight_RI.clone()
                done[f"model.layers.{number}.{name}.weight"] = each.weight_RI
                close += each.close
    return done, close


def _sharing(linears: Mapping[str, nn.Linear]) -> list[list[str]]:
    """Names of those that share an input, together."""
    groups: dict[str, list[str]] = {}
    for name in linears:
        last = name.split(".")[-1]
        first = next((group[0] for group in SHARED_INPUTS if last in group), last)
        groups.setdefault(first, []).append(name)
    return list(groups.values())


def _observe(
    network: nn.Module, linears: Mapping[str, nn.Linear], windows: Tensor, upstream: bool
) -> dict[str, Inputs]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].view(*windows.shape, -1)

        return take

    handles = [m.register_forward_pre_hook(hook(name)) for name, m in linears.items()]
    network(windows)
    for handle in handles:
        handle.remove()
    share = torch.ones(len(windows), 1, dtype=torch.float64)
    if upstream:
        share = 1 / torch.arange(1, len(windows) + 1, dtype=torch.float64)[:, None]
    inputs = {}
    for name, x_WTI in seen.items():
        flat = x_WTI.flatten(0, 1)
        inputs[name] = Inputs(
            windows=len(windows),
            squares_I=(x_WTI.double().square().sum(1) * share).mean(0),
            gram_II=flat.T @ flat,
        )
    return inputs
