"""What every source says: a fingerprint that is the same in every format and layout and another for
another model; what is made of a source says what that one says, but for what it changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.model.lora import Lora
from megatron_prune.planning.plan import Kept, PrunePlan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.replaced import MixedSource, RepairedSource, Tensors
from megatron_prune.sources.rotated import RotatedSource
from megatron_prune.sources.source import CastSource, DerivedSource, Source
from megatron_prune.store import open_source
from tests import pico


def digest(path: Path) -> str:
    source = open_source(path)
    try:
        return source.digest
    finally:
        source.close()


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("tied", [("torch_dist", 3, 1), ("torch_dist", 1, 2), ("torch", 3, 2), ("torch", 1, 4)]),
        ("qwen_tied", [("torch_dist", 4, 1), ("torch", 2, 2)]),
        ("bf16", [("torch_dist", 3, 2), ("torch", 1, 1)]),
    ],
)
def test_the_digest_is_the_same_in_every_format_and_layout(
    kind: str, layouts: list[tuple], models: Callable[[str], Path], shards: Callable[..., Path]
) -> None:
    assert {digest(shards(kind, *layout)) for layout in layouts} == {digest(models(kind))}


def test_two_models_of_one_shape_differ(models: Callable[[str], Path]) -> None:
    assert digest(models("gqa")) != digest(models("twin"))


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.3.input_layernorm.weight",
        "model.layers.2.self_attn.k_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ],
)
def test_one_tensor_of_another_model_is_noticed(
    name: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(models("gqa"), tmp_path / "m")
    tensors = pico.tensors(tmp_path / "m")
    tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    assert digest(tmp_path / "m") != digest(models("gqa"))


def test_the_same_tensors_with_other_heads_differ(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """12 heads of 4 channels have the tensors of 6 heads of 8."""
    shutil.copytree(models("gqa"), tmp_path / "m")
    path = tmp_path / "m" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(
        json.dumps(values | {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4})
    )
    assert torch.equal(
        *(pico.tensors(p)["lm_head.weight"] for p in (models("gqa"), tmp_path / "m"))
    )
    assert digest(tmp_path / "m") != digest(models("gqa"))


class Watched(DerivedSource):
    """A source that counts its reads, and how often it was closed."""

    reads = closed = 0

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        self.reads += 1
        return super().read(name, start, stop)

    def close(self) -> None:
        self.closed += 1
        super().close()


def without_layer(source: Source, dropped: int) -> PrunePlan:
    kept = tuple(i for i in range(source.config.shape.num_layers) if i != dropped)
    return PrunePlan(
        source=source.config.shape,
        kept=Kept(layers=kept),
        source_digest=source.digest,
        criterion="random",
        seed=1,
        prune_type="balance",
        balance_for=1,
    )


def test_the_digest_is_read_once(models: Callable[[str], Path]) -> None:
    source = Watched(open_source(models("gqa")))
    plan = without_layer(source, 1)
    reads = source.reads
    PrunedSource(source, plan), PrunedSource(source, plan)
    assert source.reads == reads > 0 and source.digest == plan.source_digest


FACTS = ("path", "format", "grid", "companion_files", "iteration", "stored_vocab_size")
HISTORY = ("plan_path", "has_optimizer_state", "lora")


def test_what_is_made_of_a_source_says_what_that_one_says(
    shards: Callable[..., Path], tmp_path: Path
) -> None:
    source = Watched(open_source(shards("gqa", "torch_dist", 3, 1)))
    source.plan_path, source.has_optimizer_state = tmp_path / "plan.json", True
    source.lora = Lora(rank=1, alpha=1.0, targets=("linear_qkv",))
    basis = torch.eye(source.config.shape.hidden_size)
    pruned = PrunedSource(source, without_layer(source, 1))
    other_weights: list[Source] = [
        pruned,
        RepairedSource(pruned, Tensors(tmp_path)),
        MixedSource(pruned, pruned, {}),
        RotatedSource(source, basis, {}),
    ]
    cast = CastSource(source, "bf16")

    def facts(of: Source, names: tuple[str, ...]) -> dict[str, Any]:
        return {name: getattr(of, name) for name in names}

    for derived in (cast, *other_weights):
        assert facts(derived, FACTS) == facts(source, FACTS), derived
    assert facts(cast, HISTORY) == facts(source, HISTORY)
    for derived in other_weights:  # neither planned, nor adapted, nor trained
        assert [*facts(derived, HISTORY).values()] == [None, False, None], derived
        derived.close()
    assert source.closed == len(other_weights)


def test_a_pruned_model_names_the_tensors_that_it_is_cut_from(
    models: Callable[[str], Path],
) -> None:
    source = open_source(models("gqa"))
    pruned = PrunedSource(source, without_layer(source, 1))
    name = "decoder.layers.{}.input_layernorm.weight"
    assert pruned.stored_name(name.format(1)) == source.stored_name(name.format(2))
