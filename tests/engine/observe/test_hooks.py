"""The Transformer Engine trap: a fused module shows a hook the norm's input, not its output.

Statistics have to be the same whether norms are modules of their own or fused into the linear
behind them. A stand-in for the fused module runs on a CPU; the real one where there is a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron_prune.criteria.observed import Observed
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions, build_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import Groups, model_parallel
from megatron_prune.engine.observe.hooks import norm_site, observe
from megatron_prune.model.blocks import HALVES
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source
from tests.engine.conftest import token_ids
from tests.pico import TEXT, ok

Models = Callable[[str], Path]
SEQ = 24


class Fused(torch.nn.Module):
    """Norm and linear in one, as `TELayerNormColumnParallelLinear` has them."""

    def __init__(self, norm: Any, linear: Any) -> None:
        super().__init__()
        self.layer_norm_weight, self.eps = norm.weight, norm.eps
        self._linear = [linear]  # not a submodule of its own to hook

    def forward(self, x_sbD: Tensor) -> Any:
        weight = self.layer_norm_weight
        return self._linear[0](F.rms_norm(x_sbD, weight.shape, weight, self.eps))


def _fuse(model: LanguageModel) -> list[Fused]:
    """Fuse all norms but the final one, as Transformer Engine's layer spec does."""
    fused = []
    for layer in model.decoder.layers:
        (first, qkv), (second, fc1) = (norm_site(layer, half) for half in HALVES)
        layer.self_attention.linear_qkv = Fused(first, qkv)
        layer.mlp.linear_fc1 = Fused(second, fc1)
        layer.input_layernorm = layer.pre_mlp_layernorm = torch.nn.Identity()
        fused += [layer.self_attention.linear_qkv, layer.mlp.linear_fc1]
    return fused


def _model(source: Source, groups: Groups) -> LanguageModel:
    model = build_model(source.config, groups, ModelOptions(seq_length=SEQ)).eval()
    load_weights(model, source, groups)
    return model


def _observed(models: Models, fused: bool, ids: Tensor) -> tuple[Observed, Tensor, Tensor]:
    """The statistics, the losses, and sum_b (mean_s |x|)^2 [2 L, D] of what a hook on the linear
    behind each norm sees."""
    naive: dict[int, Tensor] = {}
    with model_parallel(ParallelGrid()) as groups:
        source = open_source(models("gqa"))
        model = _model(source, groups)
        if fused:
            behind: list[Any] = list(_fuse(model))
        else:
            layers = model.decoder.layers
            behind = [norm_site(x, half)[1] for x in layers for half in HALVES]
        for number, module in enumerate(behind):

            def hook(_: Any, args: Any, number: int = number) -> None:
                size = args[0].double().abs().mean(0).square().sum(0)
                naive[number] = naive.get(number, 0) + size

            module.register_forward_pre_hook(hook)
        seen, losses = observe(model, source.config, ids, groups)
        hooks = [m for m in model.modules() if m._forward_pre_hooks or m._forward_hooks]
        assert [m for m in hooks if m not in behind] == [], "observe left a hook behind"
    return seen, losses, torch.stack([naive[number] for number in range(len(behind))])


def test_a_norm_fused_with_its_linear_gives_the_same_statistics(models: Models) -> None:
    ids = token_ids(379, rows=3, length=SEQ)
    alone, losses, _ = _observed(models, False, ids)
    fused, others, _ = _observed(models, True, ids)
    torch.testing.assert_close(losses, others)
    for name, x in alone.tensors().items():
        torch.testing.assert_close(fused.tensors()[name], x, rtol=1e-5, atol=1e-6, msg=name)


def test_a_hook_on_the_module_behind_the_norm_falls_into_the_trap(models: Models) -> None:
    """The control: right where norms are apart, wrong where they are fused."""
    ids = token_ids(379, rows=3, length=SEQ)
    for fused in (False, True):
        seen, _, naive = _observed(models, fused, ids)
        wanted = seen.norm_abs[: len(naive)]
        far = float((naive - wanted).abs().max() / wanted.max())
        assert far > 0.1 if fused else far < 1e-5


def _has_transformer_engine() -> bool:
    from importlib.util import find_spec

    return find_spec("transformer_engine") is not None and torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not _has_transformer_engine(), reason="no transformer_engine with CUDA")
def test_transformer_engine_gives_the_scores_of_the_local_layers(
    models: Models, tmp_path: Path
) -> None:
    """Its fp32 products are TensorFloat-32's: 1e-2, where the trap is ten times as far away."""
    (tmp_path / "text").write_text(TEXT * 40)
    found = {}
    for impl in ("local", "transformer_engine"):
        ok(
            "score", "--load", models("gqa"), "--data", tmp_path / "text", "--seq-length", 32,
            "--num-samples", 5, "--criterion", "activation,wanda,residual-energy,taylor",
            "--transformer-impl", impl, "--save", tmp_path / impl,
        )  # fmt: skip
        found[impl] = load_file(tmp_path / impl)
    for name, x in found["local"].items():
        far = (found["transformer_engine"][name] - x).abs().max() / x.abs().max()
        assert float(far) < 1e-2, name
