"""Law 2: prune and shard commute, bitwise, for every plan; keeping everything is the identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_prune.families.config import hf_name
from megatron_prune.model.axes import axes_of, names, split_dim
from megatron_prune.planning.plan import Kept, PrunePlan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.store import open_source
from tests.pico import assert_same, directory_bytes, ok, slice_by_plan, tensors

Models, Shards, Plans = Callable[[str], Path], Callable[..., Path], Callable[[str], Path]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"

SOURCES = [
    *[("gqa", *layout) for layout in (("torch_dist", 3, 1), ("torch", 3, 1), ("torch", 3, 2))],
    *[("tied", *layout) for layout in (("torch_dist", 3, 2), ("torch", 1, 2))],
    *[("qwen", *layout) for layout in (("torch_dist", 3, 1), ("torch", 3, 2))],
    *[("all_bias", *layout) for layout in (("torch_dist", 3, 1), ("torch", 3, 1))],
    *[("mha", *layout) for layout in (("torch_dist", 2, 2), ("torch", 6, 1))],
    *[("four", *layout) for layout in (("torch_dist", 4, 1), ("torch", 2, 2))],
    *[("qwen_tied", *layout) for layout in (("torch_dist", 2, 2), ("torch", 4, 1))],
    *[("qwen3", "torch_dist", 3, 1), ("qwen3_tied", "torch", 2, 2)],
    *[("mqa", "torch", 1, 2), ("bf16", "torch_dist", 3, 1), ("mistral", "torch", 3, 1)],
]


@pytest.mark.parametrize("kind", sorted({kind for kind, *_ in SOURCES} | {"attention_bias"}))
def test_prune_equals_an_independent_slicer(
    kind: str, models: Models, plans: Plans, tmp_path: Path
) -> None:
    out = ("--save", tmp_path / "p", "--to", "hf")
    ok("prune", "--load", models(kind), "--plan", plans(kind), *out)
    assert_same(tensors(tmp_path / "p"), slice_by_plan(tensors(models(kind)), plans(kind)))
    given = ("--source", models(kind), "--plan", plans(kind))
    assert "as planned" in ok("verify", "--load", tmp_path / "p", *given).out


@pytest.mark.parametrize(("kind", "ckpt_format", "tp", "pp"), SOURCES)
def test_pruning_shards_equals_pruning_the_whole(
    kind: str,
    ckpt_format: str,
    tp: int,
    pp: int,
    models: Models,
    shards: Shards,
    plans: Plans,
    tmp_path: Path,
) -> None:
    source = shards(kind, ckpt_format, tp, pp)
    ok("prune", "--load", source, "--plan", plans(kind), "--save", tmp_path / "p", "--to", "hf")
    assert_same(tensors(tmp_path / "p"), slice_by_plan(tensors(models(kind)), plans(kind)))


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
@pytest.mark.parametrize(
    ("kind", "tp", "pp"),
    [("gqa", 3, 1), ("tied", 3, 3), ("qwen", 1, 3), ("mha", 3, 2), ("four", 2, 2)],
)
def test_prune_then_shard_writes_the_same_bytes_as_pruning_into_shards(
    kind: str, tp: int, pp: int, ckpt_format: str, models: Models, plans: Plans, tmp_path: Path
) -> None:
    """Whole directories, manifest and plan included."""
    plan = ("--plan", plans(kind))
    to = ("--to", "megatron", "--ckpt-format", ckpt_format, TP, tp, PP, pp)
    ok("prune", "--load", models(kind), *plan, "--save", tmp_path / "one", *to)
    ok("prune", "--load", models(kind), *plan, "--save", tmp_path / "whole", "--to", "hf")
    ok("convert", "--load", tmp_path / "whole", "--save", tmp_path / "two", *to)
    assert directory_bytes(tmp_path / "one") == directory_bytes(tmp_path / "two")
    given = ("--source", models(kind), *plan)
    assert "as planned" in ok("verify", "--load", tmp_path / "one", *given).out


def _rank_slice(name: str, x: Tensor, plan: dict[str, Any], rank: int, tp: int) -> Tensor:
    """One rank's stored tensor as the plan leaves it: plain loops over Megatron's own storage.

    The kept indices of the rank's own part of each axis, counted from its start. Needs a plan that
    is balanced for ``tp``.
    """
    kept, shape = plan["kept"], plan["source"]
    width, heads = shape["kv_channels"], shape["num_attention_heads"]
    groups = shape["num_query_groups"] // tp
    per_group = heads // shape["num_query_groups"]
    hidden = kept["hidden"] or list(range(shape["hidden_size"]))
    if ".layers." not in name:
        return x[..., hidden]
    layer = name.split(".")[2]

    def mine(indices: list[int], size: int) -> list[int]:
        return [i - size // tp * rank for i in indices if i * tp // size == rank]

    q = mine(kept["heads"][layer], heads)
    if kept["query_groups"] is None:
        kept_groups = list(range(groups))
    else:
        kept_groups = mine(kept["query_groups"][layer], shape["num_query_groups"])
    f = mine(kept["ffn"][layer], shape["ffn_hidden_size"])
    if "layer_norm" in name or name.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return x[hidden]
    if "linear_qkv" in name:
        rows = []
        for group in kept_groups:
            first = group * (per_group + 2) * width
            for head in q:
                if head // per_group == group:
                    start = first + head % per_group * width
                    rows += range(start, start + width)
            rows += range(first + per_group * width, first + (per_group + 2) * width)
        x = x[rows]
    elif "linear_fc1" in name:
        half = x.shape[0] // 2
        x = x[[*f, *(half + i for i in f)]]
    elif "linear_proj" in name:
        return x[hidden][:, [head * width + i for head in q for i in range(width)]]
    else:
        return x[hidden][:, f]
    return x[:, hidden] if x.ndim == 2 else x


@pytest.mark.parametrize(
    ("kind", "tp"), [("gqa", 3), ("qwen", 3), ("all_bias", 3), ("mha", 3), ("four", 2)]
)
def test_a_balanced_plan_prunes_each_rank_by_itself(
    kind: str, tp: int, models: Models, shards: Shards, plans: Plans, tmp_path: Path
) -> None:
    """Rank by rank on Megatron's fused tensors: no weight crosses ranks, and the join is the whole.

    The predecessor's way of pruning; here it is only the reference.
    """
    source, plan = shards(kind, "torch", tp, 1), json.loads(plans(kind).read_text())
    to = ("--to", "megatron", "--ckpt-format", "torch", TP, tp)
    ok("prune", "--load", source, "--plan", plans(kind), "--save", tmp_path / "p", *to)
    layers = plan["kept"]["layers"] or list(range(plan["source"]["num_layers"]))
    for rank in range(tp):
        file = f"iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt"
        before = torch.load(source / file, weights_only=False)["model"]
        after = torch.load(tmp_path / "p" / file, weights_only=False)["model"]
        wanted = {}
        for name, x in before.items():
            words = name.split(".")
            if x is None or (words[1] == "layers" and int(words[2]) not in layers):
                continue
            sliced = _rank_slice(name, x, plan, rank, tp)
            if words[1] == "layers":
                words[2] = str(layers.index(int(words[2])))
            wanted[".".join(words)] = sliced
        assert_same({n: x for n, x in after.items() if isinstance(x, Tensor)}, wanted)


def test_unbalanced_plans_come_out_evenly_sharded(
    models: Models, shards: Shards, tmp_path: Path
) -> None:
    plan = tmp_path / "u.json"
    flags = ("--ffn-hidden-size-remain", 51, "--prune-type", "unbalance", "--seed", 5)
    ok("plan", "--load", models("gqa"), "--save", plan, *flags)
    to = ("--to", "megatron", "--ckpt-format", "torch", TP, 3)
    source = shards("gqa", "torch", 3, 1)
    ok("prune", "--load", source, "--plan", plan, "--save", tmp_path / "p", *to)
    shapes = []
    for rank in range(3):
        file = tmp_path / f"p/iter_0000001/mp_rank_{rank:02d}/model_optim_rng.pt"
        model = torch.load(file, weights_only=False)["model"]
        shapes.append({n: tuple(x.shape) for n, x in model.items() if x is not None})
    assert shapes[0] == shapes[1] == shapes[2]
    ok("convert", "--load", tmp_path / "p", "--save", tmp_path / "b", "--to", "hf")
    assert_same(tensors(tmp_path / "b"), slice_by_plan(tensors(models("gqa")), plan))


@pytest.mark.parametrize("kind", ["gqa", "tied", "qwen", "mha"])
def test_the_plan_of_everything_is_the_identity(
    kind: str, models: Models, shards: Shards, tmp_path: Path
) -> None:
    ok("plan", "--load", models(kind), "--save", tmp_path / "i.json")
    source = shards(kind, "torch", 3, 1)
    given = ("--load", source, "--plan", tmp_path / "i.json")
    ok("prune", *given, "--save", tmp_path / "p", "--to", "hf")
    assert_same(tensors(tmp_path / "p"), tensors(models(kind)))


@pytest.mark.parametrize("kind", ["gqa", "four", "qwen", "all_bias"])
def test_every_plan_reads_as_the_independent_slicer_slices(
    kind: str, models: Models, tmp_path: Path
) -> None:
    """Random plans, random ranges of each tensor's split axis."""
    source = open_source(models(kind))
    shape, whole = source.config.shape, tensors(models(kind))
    digest, file = source.digest, tmp_path / "plan.json"

    def subset(data: Any, size: int) -> tuple[int, ...]:
        return tuple(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=9))))

    @settings(max_examples=25)
    @given(st.data())
    def check(data: Any) -> None:
        layers = subset(data, shape.num_layers)
        keep_groups = data.draw(st.integers(1, shape.num_query_groups))
        per_group = data.draw(st.integers(1, shape.heads_per_group))
        channels = data.draw(st.integers(1, 9))
        groups, heads, ffn = {}, {}, {}
        for layer in layers:
            among = data.draw(st.permutations(range(shape.num_query_groups)))[:keep_groups]
            groups[layer] = tuple(sorted(among))
            heads[layer] = tuple(
                sorted(
                    g * shape.heads_per_group + h
                    for g in among
                    for h in data.draw(st.permutations(range(shape.heads_per_group)))[:per_group]
                )
            )
            chosen = data.draw(st.sets(st.integers(0, 95), min_size=channels, max_size=channels))
            ffn[layer] = tuple(sorted(chosen))
        plan = PrunePlan(
            source=shape,
            kept=Kept(
                layers=layers, hidden=subset(data, 48), heads=heads, query_groups=groups, ffn=ffn
            ),
            criterion="random",
            seed=0,
            prune_type="unbalance",
            balance_for=1,
            source_digest=digest,
        )
        file.write_text(plan.to_json())
        wanted, pruned = slice_by_plan(whole, file), PrunedSource(source, plan)
        for name in names(pruned.config):
            x, axes = wanted[hf_name(name, source.config.family)], axes_of(name)
            dim = split_dim(axes)
            if dim is None:
                assert torch.equal(pruned.read(name), x)
                continue
            size, rows = plan.target.size(axes[dim]), plan.target.rows(axes[dim])
            start = data.draw(st.integers(0, size - 1))
            stop = data.draw(st.integers(start + 1, size))
            part = x.narrow(dim, start * rows, (stop - start) * rows)
            assert torch.equal(pruned.read(name, start, stop), part)

    check()
