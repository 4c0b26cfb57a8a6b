"""The plan file: what it holds, that it survives the disk, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_prune.errors import PlanError, ShapeError
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.plan import Kept, PrunePlan, load_plan, plan_from_dict

SHAPE = ModelShape(
    num_layers=4,
    hidden_size=48,
    ffn_hidden_size=96,
    num_attention_heads=6,
    num_query_groups=3,
    kv_channels=8,
    vocab_size=379,
)


def per_layer(*indices: int, layers: tuple[int, ...] = (0, 1, 2, 3)) -> dict[int, tuple[int, ...]]:
    return dict.fromkeys(layers, indices)


def plan(**kept: Any) -> PrunePlan:
    return PrunePlan(
        source=SHAPE,
        kept=Kept(**kept),
        criterion="random",
        seed=7,
        prune_type="balance",
        balance_for=3,
        source_digest="d" * 64,
    )


FULL = {
    "layers": (0, 2, 3),
    "hidden": (0, 5, 47),
    "heads": per_layer(0, 2, 4, layers=(0, 2, 3)),
    "ffn": per_layer(1, 40, 95, layers=(0, 2, 3)),
}


def test_a_plan_of_everything_has_the_sources_shape_and_only_nulls() -> None:
    identity = plan()
    assert identity.target == SHAPE
    assert set(json.loads(identity.to_json())["kept"].values()) == {None}
    assert identity.tensor("D") is None and identity.tensor("Q", 2) is None


def test_target_shape_counts_the_kept_indices() -> None:
    target = plan(**FULL).target
    assert (target.num_layers, target.hidden_size, target.ffn_hidden_size) == (3, 3, 3)
    assert (target.num_attention_heads, target.num_query_groups) == (3, 3)
    assert (target.kv_channels, target.vocab_size) == (8, 379)


def test_the_file_reads_back_as_the_same_plan_with_the_same_bytes(tmp_path: Path) -> None:
    before = plan(**FULL)
    (tmp_path / "p.json").write_text(before.to_json())
    after = load_plan(tmp_path / "p.json")
    assert after == before
    assert after.to_json() == before.to_json() and after.digest == before.digest


def test_the_file_is_the_documented_json() -> None:
    values = json.loads(plan(**FULL).to_json())
    assert list(values) == [
        *("version", "source", "target", "criterion", "seed", "prune_type", "balance_for"),
        *("source_digest", "kept"),
    ]
    assert values["version"] == 1 and values["source"] == SHAPE.as_dict()
    assert list(values["kept"]) == ["layers", "hidden", "heads", "query_groups", "ffn", "vocab"]
    assert values["kept"]["heads"] == {"0": [0, 2, 4], "2": [0, 2, 4], "3": [0, 2, 4]}
    assert values["kept"]["query_groups"] is None and values["kept"]["vocab"] is None


def test_the_digest_tells_decisions_apart() -> None:
    one = plan(**FULL)
    assert one.digest == plan(**FULL).digest
    assert one.digest != replace(one, seed=8).digest
    assert one.digest != plan(**{**FULL, "hidden": (0, 5, 46)}).digest


def test_the_digest_of_a_plan_is_what_it_always_was() -> None:
    """Digests stand in manifests and caches: a field that is new must not touch old plans."""
    assert plan(**FULL).digest.startswith("0bcde7f6fd4c7b50572db564c71dceac")
    assert plan().digest.startswith("52da1057e2acf5520277c3b77e8990ac")


UNEQUAL = {0: (1, 2, 3), 1: (0,), 2: (5, 95), 3: (1, 2, 3)}


def test_a_plan_that_is_not_uniform_says_so_and_reads_back(tmp_path: Path) -> None:
    before = replace(plan(), kept=Kept(ffn=UNEQUAL), uniform=False)
    values = json.loads(before.to_json())
    assert values["uniform"] is False and "uniform" not in json.loads(plan().to_json())
    assert values["target"]["ffn_per_layer"] == [3, 1, 2, 3]
    assert before.target.ffn_hidden_size == 3
    (tmp_path / "p.json").write_text(before.to_json())
    after = load_plan(tmp_path / "p.json")
    assert after == before and after.digest == before.digest
    del values["uniform"]
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match=r"kept.ffn: layers keep \[1, 2, 3\]; wanted equally"):
        load_plan(tmp_path / "p.json")


def test_only_ffn_channels_may_differ_between_layers() -> None:
    heads = {**per_layer(0, 2, 4), 1: (0, 1, 2, 3, 4, 5)}
    with pytest.raises(PlanError, match=r"kept.heads: layers keep \[3, 6\]; wanted equally"):
        replace(plan(), kept=Kept(heads=heads), uniform=False)


def test_a_model_whose_layers_differ_is_not_pruned_again() -> None:
    source = replace(SHAPE, ffn_per_layer=(96, 48, 48, 48))
    with pytest.raises(ShapeError, match="plan: layers have 48 to 96 FFN channels; wanted equally"):
        replace(plan(), source=source)


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"hidden": ()}, "kept.hidden: keeps nothing"),
        ({"hidden": (3, 1)}, "kept.hidden: not sorted, or an index stands twice"),
        ({"hidden": (1, 1)}, "stands twice"),
        ({"hidden": (0, 48)}, "kept.hidden: holds 48 and 0; wanted 0 to 47"),
        ({"hidden": (-1, 3)}, "holds 3 and -1"),
        ({"hidden": (0, True)}, "something other than integers"),
        ({"hidden": (0.0, 1)}, "something other than integers"),
        ({"layers": (0, 4)}, "kept.layers: holds 4 and 0; wanted 0 to 3"),
        ({"layers": ()}, "kept.layers: keeps nothing"),
        ({"vocab": (379,)}, "kept.vocab: holds 379"),
        ({"ffn": per_layer(0, layers=(0, 1))}, r"has layers \[0, 1\], the plan keeps \[0, 1, 2, 3"),
        ({"ffn": {**per_layer(0), 3: (0, 1)}}, r"kept.ffn: layers keep \[1, 2\]; wanted equally"),
        ({"ffn": per_layer(96)}, r"kept.ffn\[0\]: holds 96"),
        ({"heads": per_layer(0, 1, 2)}, r"layer 0: groups keep \{0: 2, 1: 1, 2: 0\} heads"),
        (
            {"heads": per_layer(0, 1, 2, 3), "query_groups": per_layer(0, 2)},
            "layer 0: head 2 is kept, its query group 1 is not; kept groups are .0, 2.",
        ),
        ({"query_groups": per_layer(0, 1)}, "head 4 is kept, its query group 2 is not"),
    ],
)
def test_an_impossible_plan_is_refused_with_its_values(kept: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan(**kept)


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=2), "version 2; this reads version 1"),
        (lambda v: v.pop("kept"), "not a plan: 'kept' is missing"),
        (lambda v: v["kept"].pop("vocab"), "not a plan: 'vocab' is missing"),
        (lambda v: v.update(kept=[]), "not a plan"),
        (lambda v: v.update(seed="one"), "not a plan: invalid literal"),
        (lambda v: v.update(seed=float("inf")), "not a plan: OverflowError"),
        (lambda v: v["kept"].update(hidden="abc"), "something other than integers"),
        (lambda v: v["kept"].update(hidden=7), "not a plan: TypeError"),
        (lambda v: v["kept"].update(heads=[1]), "not a plan: AttributeError"),
        (lambda v: v["kept"]["heads"].update(x=[1]), "not a plan: invalid literal"),
        (lambda v: v["target"].update(hidden_size=4), "target says .*4.*, its indices give .*3"),
        (lambda v: v["source"].update(num_query_groups=4), "6 is not a multiple of .* 4"),
        (lambda v: v["source"].pop("vocab_size"), r"missing \['vocab_size'\]"),
        (lambda v: v.update(prune_type="sideways"), "prune_type 'sideways'; wanted balance or"),
        (lambda v: v.update(balance_for=0), "balance_for 0; wanted 1 or more"),
        (lambda v: v.update(uniform="no"), "uniform is 'no'; wanted true or false"),
        (lambda v: v["target"].update(ffn_per_layer=[3, 2, 1]), "target says .* indices give"),
    ],
)
def test_a_tampered_file_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    values = json.loads(plan(**FULL).to_json())
    change(values)
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match=message) as caught:
        load_plan(tmp_path / "p.json")
    assert str(caught.value).startswith(f"--plan {tmp_path / 'p.json'}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a plan"),
        (b"null", "not a plan"),
    ],
)
def test_what_is_no_plan_file_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "p.json").write_bytes(content)
    with pytest.raises(PlanError, match=message):
        load_plan(tmp_path / "p.json")


def test_plan_from_dict_takes_whole_axes_as_null() -> None:
    values = json.loads(plan(hidden=(1, 2)).to_json())
    assert plan_from_dict(values).kept == Kept(hidden=(1, 2))
