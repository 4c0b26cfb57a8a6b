"""A model with gates computes what the pruned model computes with the gates folded in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_prune.engine.forward.gates import GatedModel, OpenGates
from megatron_prune.engine.forward.model import LanguageModel, ModelOptions, build_model
from megatron_prune.engine.forward.weights import load_weights
from megatron_prune.engine.groups import Groups, model_parallel
from megatron_prune.errors import ConfigError
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import AXES
from megatron_prune.planning.choose import Targets, make_plan
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.shearing.folding import Gates
from megatron_prune.sources.folded import FoldedSource
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source
from tests.launch import free_groups
from tests.pico import IDS, make_model

CUTS = {
    "heads": Targets(hidden_size=36, ffn_hidden_size=64, num_attention_heads=3, num_layers=3),
    "groups": Targets(hidden_size=36, num_attention_heads=2, num_query_groups=1, num_layers=3),
    "mha": Targets(hidden_size=36, ffn_hidden_size=64, num_attention_heads=4, num_layers=3),
    "ffn": Targets(ffn_hidden_size=64),
    "layers": Targets(num_layers=2),
}
CASES = [
    ("gqa", "heads"), ("gqa", "groups"), ("tied", "heads"), ("mha", "mha"), ("all_bias", "heads"),
    ("qwen3", "groups"), ("qwen_tied", "ffn"), ("qwen", "layers"),
]  # fmt: skip


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind, cut = request.param
    folder = make_model(tmp_path_factory.mktemp("gates") / kind, kind)
    source = open_source(folder)
    generator = torch.Generator().manual_seed(7)
    rows = source.config.shape.num_layers

    def score(axis: str, size: int, layer: int | None, seed: int) -> Tensor:
        return torch.rand(size, generator=torch.Generator().manual_seed(size + (layer or 0)))

    plan = make_plan(
        source.config.shape, CUTS[cut], score, criterion_name="noise", seed=0,
        prune_type="unbalance", balance_for=1, source_digest=source.digest,
    )  # fmt: skip
    pruned = {
        letter for letter, axis in AXES.items() if getattr(plan.kept, axis.word, None) is not None
    }
    soft = {
        letter: 0.2 + 0.7 * torch.rand(
            rows if AXES[letter].is_per_layer else 1, source.config.shape.size(letter),
            generator=generator,
        )
        for letter in sorted(pruned)
    }  # fmt: skip
    yield source, plan, soft
    source.close()


@contextmanager
def running(source: Source) -> Iterator[tuple[LanguageModel, Groups]]:
    with model_parallel(ParallelGrid(), timeout_minutes=1) as groups:
        model = build_model(source.config, groups, ModelOptions(seq_length=IDS.shape[1]))
        load_weights(model, source, groups)
        yield model.eval(), groups
    free_groups()


def logits(model: LanguageModel) -> Tensor:
    with torch.no_grad():
        return model(IDS, None, None)[..., : model.true_vocab_size].float()


def open_gates(plan: PrunePlan, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the plan drops is shut."""
    found = {}
    for letter, x in values.items():
        stays = torch.zeros_like(x, dtype=torch.bool)
        if not AXES[letter].is_per_layer:
            kept = plan.layers if letter == "L" else plan.indices(letter)
            stays[0, list(kept)] = True
        else:
            for layer in plan.layers:
                stays[layer, list(plan.indices(letter, layer))] = True
        found[letter] = x * stays
    return found


def folded(source: Source, plan: PrunePlan, values: dict[str, Tensor]) -> Source:
    by_axis = {}
    for letter, x in values.items():
        if not AXES[letter].is_per_layer:
            by_axis[letter] = x[0, list(plan.layers if letter == "L" else plan.indices(letter))]
        else:
            by_axis[letter] = torch.stack(
                [x[n, list(plan.indices(letter, n))] for n in plan.layers]
            )
    pruned = PrunedSource(source, plan)
    return FoldedSource(pruned, Gates(shape=plan.target, by_axis=by_axis))


@pytest.mark.parametrize("is_hard", [False, True], ids=["soft", "hard"])
def test_gates_are_what_is_folded(case: Any, is_hard: bool) -> None:
    source, plan, soft = case
    values = {letter: torch.ones_like(x) if is_hard else x for letter, x in soft.items()}
    now: OpenGates | None = None
    with running(source) as (model, groups):
        GatedModel(model, source.config, groups, lambda: now)
        plain = logits(model)
        now = OpenGates.of(open_gates(plan, values))
        gated = logits(model)
        now = OpenGates.of({letter: torch.ones_like(x) for letter, x in values.items()})
        opened = logits(model)
    with running(folded(source, plan, values)) as (model, _):
        wanted = logits(model)
    scale = float(wanted.abs().max())
    assert float((gated - wanted).abs().max()) < 2e-6 * scale
    assert torch.equal(opened, plain), "open gates change nothing"
    assert float((gated - plain).abs().max()) > 0.05 * scale, "the gates do nothing here"


def test_every_axis_is_gated_apart(case: Any) -> None:
    """A control: what one axis' gates do is not what the others do."""
    source, plan, soft = case
    values, seen = open_gates(plan, soft), []
    now: OpenGates | None = None
    with running(source) as (model, groups):
        GatedModel(model, source.config, groups, lambda: now)
        seen.append(logits(model))
        for letter in values:
            now = OpenGates.of({letter: values[letter]})
            seen.append(logits(model))
    far = [float((a - b).abs().max()) for i, a in enumerate(seen) for b in seen[:i]]
    assert min(far) > 1e-3


def test_gradients_reach_gates_as_differences_do(tmp_path: Path) -> None:
    """Of some gates of every axis: the leaf's gradient against central differences."""
    source = open_source(make_model(tmp_path / "gqa", "gqa"))
    shape, generator = source.config.shape, torch.Generator().manual_seed(3)
    leaf = {
        letter: (0.3 + 0.5 * torch.rand(
            shape.num_layers if AXES[letter].is_per_layer else 1, shape.size(letter),
            generator=generator)).requires_grad_()
        for letter in "DQKFL"
    }  # fmt: skip
    now: OpenGates | None = None
    with running(source) as (model, groups):
        GatedModel(model, source.config, groups, lambda: now)

        def loss(values: dict[str, Tensor]) -> Tensor:
            nonlocal now
            now = OpenGates.of(values)
            return model(IDS, None, None, labels=IDS.roll(-1, 1)).double().mean()

        loss(leaf).backward()
        for letter, x in leaf.items():
            assert x.grad is not None
            row = x.shape[0] - 1
            place = int(x.grad[row].abs().argmax())
            moved = {}
            for sign in (1, -1):
                values = {key: y.detach().clone() for key, y in leaf.items()}
                values[letter][row, place] += sign * 1e-2
                with torch.no_grad():
                    moved[sign] = float(loss(values))
            slope = (moved[1] - moved[-1]) / 2e-2
            assert slope == pytest.approx(float(x.grad[row, place]), rel=2e-2, abs=1e-5), letter
    source.close()


def test_a_layer_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = open_source(make_model(tmp_path / "gqa", "gqa"))
    with running(source) as (model, groups):
        model.decoder.final_layernorm = torch.nn.RMSNorm(48)
        with pytest.raises(ConfigError, match="RMSNorm has no place"):
            GatedModel(model, source.config, groups, lambda: None)
    source.close()
