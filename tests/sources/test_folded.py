"""What `FoldedSource` reads and says; the record of its gates, exactly, and what is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_prune.errors import DamagedError, ShapeError
from megatron_prune.files.parsing import JSON_BYTES
from megatron_prune.model.axes import axes_of, names, split_dim, split_layer
from megatron_prune.model.lora import Lora
from megatron_prune.model.shape import SCORED_AXES
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.shearing.folding import Gates, fold
from megatron_prune.sources.folded import FoldedSource
from megatron_prune.sources.folding_record import Folding, load_folding
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.source import DerivedSource, Source
from megatron_prune.store import open_source
from tests.gates import random_gates
from tests.pico import VOCAB

Models, Plans = Callable[[str], Path], Callable[[str], Path]


class Seen(DerivedSource):
    """A source that notes what is read of it."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.asked: list[tuple[str, int, int | None]] = []

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        self.asked.append((name, start, stop))
        return super().read(name, start, stop)


def pruned_by(models: Models, plans: Plans, kind: str) -> tuple[Source, PrunePlan]:
    plan = load_plan(plans(kind))
    return PrunedSource(open_source(models(kind)), plan), plan


@pytest.mark.parametrize("kind", ["gqa", "tied", "mha", "bf16"])
def test_any_slice_is_that_of_the_whole_and_no_more_is_read(
    kind: str, models: Models, plans: Plans
) -> None:
    pruned, plan = pruned_by(models, plans, kind)
    gates = random_gates(plan.target)
    seen = Seen(pruned)
    folded = FoldedSource(seen, gates)
    for name in names(folded.config):
        whole = fold(name, pruned.read(name), pruned.config, gates)
        axes = axes_of(name)
        dim = split_dim(axes)
        size = 0 if dim is None else plan.target.size(axes[dim], split_layer(name)[0])
        parts = [(at, min(at + 2, size)) for at in range(0, size, 2)] or [(0, None)]
        seen.asked.clear()
        read = [folded.read(name, start, stop) for start, stop in parts]
        assert seen.asked == [(name, *part) for part in parts]
        assert {x.dtype for x in read} == {folded.dtype(name)}
        assert (read[0] if dim is None else torch.cat(read, dim)).equal(whole), name


def test_it_is_another_model_than_the_sliced_one(
    models: Models, plans: Plans, tmp_path: Path
) -> None:
    pruned, plan = pruned_by(models, plans, "gqa")
    pruned.plan_path, pruned.has_optimizer_state = tmp_path / "plan.json", True
    pruned.lora = Lora(rank=1, alpha=1.0, targets=("linear_qkv",))
    folded = FoldedSource(pruned, random_gates(plan.target))
    assert (folded.plan_path, folded.lora, folded.has_optimizer_state) == (None, None, False)
    assert folded.config is pruned.config and folded.digest != pruned.digest
    ones = {axis: torch.ones_like(x) for axis, x in random_gates(plan.target).by_axis.items()}
    assert FoldedSource(pruned, Gates(shape=plan.target, by_axis=ones)).digest == pruned.digest


def test_gates_of_a_model_of_another_shape_are_refused(models: Models, plans: Plans) -> None:
    pruned, plan = pruned_by(models, plans, "gqa")
    with pytest.raises(ShapeError, match="when pruned, its gates are of .*'num_layers': 4"):
        FoldedSource(pruned, random_gates(plan.source))


def recorded(plan: PrunePlan, gates: Gates) -> Folding:
    return Folding(
        plan_digest=plan.digest, source_digest=plan.source_digest, settings={"a": 1}, gates=gates
    )


@pytest.mark.parametrize("axes", [SCORED_AXES, "F", "LD"])
def test_a_record_gives_back_every_bit(
    axes: str, models: Models, plans: Plans, tmp_path: Path
) -> None:
    """Also of float32 that no gate is likely to have: next to powers of two, and denormal."""
    pruned, plan = pruned_by(models, plans, "gqa")
    gates = random_gates(plan.target, axes)
    odd = torch.randint(1, 0x7F7FFFFF, (40,), generator=torch.Generator().manual_seed(0))
    odd[:6] = torch.tensor([1, 0x7F7FFFFF, 0x3F800000, 0x3F7FFFFF, 0x3F800001, 0x00800000])
    for x in gates.by_axis.values():
        x.view(-1)[: len(odd)] = odd.int().view(torch.float32)[: x.numel()]
    record = recorded(plan, gates)
    (tmp_path / "folding.json").write_text(record.to_json())
    found = load_folding(tmp_path / "folding.json", plan, pruned.config)
    assert found.to_json() == record.to_json() and found.settings == {"a": 1}
    assert found.gates.words == gates.words and set(found.gates.by_axis) == set(axes)
    for axis, x in gates.by_axis.items():
        assert torch.equal(found.gates.by_axis[axis].view(torch.int32), x.view(torch.int32))


def test_records_of_the_largest_models_are_within_bounds(models: Models) -> None:
    """126 layers of 53,248 FFN channels, counted from a part of one layer."""
    shape = replace(open_source(models("gqa")).config.shape, num_layers=2, ffn_hidden_size=5000)
    text = Folding(
        plan_digest="", source_digest="", settings={}, gates=random_gates(shape, "F")
    ).to_json()
    assert len(text) / (2 * 5000) * 126 * (53248 + 128 + 8) < 0.7 * JSON_BYTES


def put(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(changes)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put(version=2), "version 2; this reads 1"),
        (drop("gates"), "not the record of gates that were folded: 'gates' is missing"),
        (put(settings=[1]), r"settings is \[1\]; wanted a table"),
        (put(gates=[1.0]), "not the record of gates that were folded"),
        (put(gates={}), "no gates; wanted some of the axes"),
        (put(gates={"vocab": [1.0] * VOCAB}), "gates of 'vocab'; wanted some of .'hidden', 'head"),
        (put(gates={"layers": [0.5, 0.5]}), r"gates of layers: are \(2,\).*; wanted \(3,\)"),
        (put(gates={"layers": [0.5, "x", 1.0]}), "not the record of gates"),
        (put(gates={"layers": [0.5, None, 1.0]}), "not the record of gates"),
        (put(gates={"layers": [0.5, [1.0], 1.0]}), "not the record of gates"),
        (put(gates={"layers": [0.5, 1e39, 1.0]}), "layers: layer 1 has inf; wanted a number, 0"),
        (put(gates={"layers": [0.5, -0.5, 1.0]}), "layers: layer 1 has -0.5; wanted a number, 0"),
        (put(plan_digest="0" * 64), "is of another plan than the one given"),
        (put(source_digest="0" * 64), "source_digest is '0000.*'; wanted that of the plan, '"),
    ],
)
def test_what_is_no_record_of_this_model_is_refused(
    edit: Callable[[dict[str, Any]], object],
    says: str,
    models: Models,
    plans: Plans,
    tmp_path: Path,
) -> None:
    pruned, plan = pruned_by(models, plans, "gqa")
    values = json.loads(recorded(plan, random_gates(plan.target)).to_json())
    edit(values)
    path = tmp_path / "folding.json"
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedError, match=says) as refusal:
        load_folding(path, plan, pruned.config)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("text", ["", "not JSON", '{"version": 1, "version": 1}', "[1]", "null"])
def test_another_file_is_no_record(text: str, models: Models, plans: Plans, tmp_path: Path) -> None:
    pruned, plan = pruned_by(models, plans, "gqa")
    (tmp_path / "folding.json").write_text(text)
    with pytest.raises(DamagedError, match="not the record of gates that were folded"):
        load_folding(tmp_path / "folding.json", plan, pruned.config)
