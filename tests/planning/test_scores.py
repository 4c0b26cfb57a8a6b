"""The scores file: what it holds, what a criterion expression means, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_prune.errors import DamagedError, PlanError
from megatron_prune.model.shape import ModelShape
from megatron_prune.planning.scores import (
    Criterion,
    Scores,
    criteria_in,
    load_scores,
    score_shape,
    scores_bytes,
)

SHAPE = ModelShape(
    num_layers=3, hidden_size=8, ffn_hidden_size=10, num_attention_heads=6, num_query_groups=3,
    kv_channels=2, vocab_size=11,
)  # fmt: skip
KEY = "megatron_prune.scores"


def _drawn(axes: str, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.rand(score_shape(axis, SHAPE), generator=generator) for axis in axes}


SCORES = Scores(
    shape=SHAPE,
    source_digest="1f" * 32,
    criteria={"a": _drawn("DQKF", 1), "b": _drawn("DQ", 2), "depth": _drawn("L", 3)},
    statistics={"norm_energy": torch.rand(7, 8)},
    provenance={"tokens": 96, "data_digest": "ab"},
)


def _asked(criterion: Criterion, axis: str, layer: int | None) -> torch.Tensor:
    return criterion(axis, SHAPE.size(axis), layer, 0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "scores.safetensors"
    path.write_bytes(scores_bytes(SCORES))
    return path


def _rewritten(file: Path, tensors: dict[str, Any] | None = None, **header: Any) -> Path:
    """The file with other tensors and other fields of its header."""
    values = {
        "version": "1", "shape": SHAPE.as_dict(), "source_digest": "1f", "provenance": {}, **header,
    }  # fmt: skip
    save_file({**load_file(file), **(tensors or {})}, file, metadata={KEY: json.dumps(values)})
    return file


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b,a", "ab"),
        ("a+2*b", "ab"),
        ("-1*b,c", "bc"),
        ("hidden=b,heads=a+0.5*c,ffn=b,layers=d", "bacd"),
        (",", ""),
    ],
)
def test_a_list_or_an_expression_names_criteria(text: str, names: str) -> None:
    assert criteria_in(text) == tuple(names)


@pytest.mark.parametrize("text", ["a,x*b", "width=a", "hidden=a,hidden=b"])
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--criterion "):
        criteria_in(text)


def test_a_file_reads_back_as_it_was_written(file: Path) -> None:
    found = load_scores(file)
    assert found.shape == SHAPE
    assert (found.source_digest, found.provenance) == (SCORES.source_digest, SCORES.provenance)
    assert {n: set(axes) for n, axes in found.criteria.items()} == {
        "a": set("DQKF"), "b": set("DQ"), "depth": {"L"},
    }  # fmt: skip
    for name, axes in SCORES.criteria.items():
        for axis, x in axes.items():
            assert torch.equal(found.criteria[name][axis], x)
    assert torch.equal(found.statistics["norm_energy"], SCORES.statistics["norm_energy"])
    assert scores_bytes(found) == file.read_bytes()


def test_scores_are_kept_in_float32(tmp_path: Path) -> None:
    double = {"a": {"D": torch.rand(8, dtype=torch.float64)}}
    (tmp_path / "x").write_bytes(scores_bytes(replace(SCORES, criteria=double)))
    assert load_scores(tmp_path / "x").criteria["a"]["D"].dtype == torch.float32


def test_every_axis_is_chosen_layer_by_layer_but_hidden_and_layers() -> None:
    assert {axis: score_shape(axis, SHAPE) for axis in "DQKFL"} == {
        "D": (8,), "Q": (3, 6), "K": (3, 3), "F": (3, 10), "L": (3,),
    }  # fmt: skip


def test_a_missing_file_is_refused_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"{tmp_path}/x: is not there; make it with `megatron-prun"):
        load_scores(tmp_path / "x")


def test_what_is_no_scores_file_or_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("criterion: wanda, and more than eight bytes")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    save_file({"x": torch.zeros(2)}, tmp_path / "json", metadata={KEY: "{"})
    save_file({"x": torch.zeros(2)}, tmp_path / "list", metadata={KEY: "[1]"})
    save_file({"x": torch.zeros(2)}, tmp_path / "empty", metadata={KEY: '{"version": "1"}'})
    deep = {KEY: '{"version":' + "[" * 100_000}
    save_file({"x": torch.zeros(2)}, tmp_path / "deep", metadata=deep)
    header = json.dumps({"version": "1", "shape": [], "source_digest": "", "provenance": {}})
    save_file({"x": torch.zeros(2)}, tmp_path / "shape", metadata={KEY: header})
    for name in ("text", "other"):
        with pytest.raises(PlanError, match=f"{name}: not a scores file"):
            load_scores(tmp_path / name)
    for name in ("json", "list", "empty", "deep"):
        with pytest.raises(DamagedError, match=f"{name}: not a scores file"):
            load_scores(tmp_path / name)
    with pytest.raises(DamagedError, match="shape: shape: missing"):
        load_scores(tmp_path / "shape")


def test_a_cut_file_is_damaged(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(DamagedError, match="not a scores file"):
        load_scores(file)


def test_scores_of_another_dtype_are_refused_by_name(file: Path) -> None:
    whole = SCORES.criteria["b"]["Q"].to(torch.int32)
    with pytest.raises(DamagedError, match=r"b\.Q is torch\.int32; wanted float32, score again"):
        load_scores(_rewritten(file, {"b.Q": whole}))


def test_another_version_is_refused(file: Path) -> None:
    with pytest.raises(DamagedError, match="version '2'; this reads 1"):
        load_scores(_rewritten(file, version="2"))


def test_a_value_that_is_not_finite_is_refused_by_name(file: Path) -> None:
    bad = SCORES.criteria["b"]["Q"].clone()
    bad[2, 1] = torch.nan
    with pytest.raises(DamagedError, match=r"b\.Q holds values that are not finite; score again"):
        load_scores(_rewritten(file, {"b.Q": bad}))


@pytest.mark.parametrize(
    ("name", "size", "says"),
    [
        ("a.F", (3, 9), r"scores a of axis F are \(3, 9\), the model wants \(3, 10\)"),
        ("a.D", (3, 8), r"scores a of axis D are \(3, 8\), the model wants \(8,\)"),
        ("depth.L", (4,), r"scores depth of axis L are \(4,\), the model wants \(3,\)"),
        ("a.Z", (4,), "scores a of axis 'Z', which no model has"),
    ],
)
def test_scores_of_another_shape_are_refused(
    name: str, size: tuple[int, ...], says: str, file: Path
) -> None:
    with pytest.raises(DamagedError, match=f"^{file}: {says}"):
        load_scores(_rewritten(file, {name: torch.zeros(size)}))


def test_a_shape_that_is_none_is_refused_with_the_files_name(file: Path) -> None:
    with pytest.raises(DamagedError, match=f"{file}: num_layers is 0"):
        load_scores(_rewritten(file, shape={**SHAPE.as_dict(), "num_layers": 0}))


# ---- expressions ---------------------------------------------------------------------------------


def test_a_name_gives_the_scores_of_the_axis_and_layer() -> None:
    criterion = SCORES.criterion("a")
    assert torch.equal(_asked(criterion, "D", None), SCORES.criteria["a"]["D"].double())
    for axis in "QKF":
        assert torch.equal(_asked(criterion, axis, 2), SCORES.criteria["a"][axis][2].double())


def test_layers_are_scored_as_a_whole() -> None:
    found = _asked(SCORES.criterion("depth"), "L", None)
    assert torch.equal(found, SCORES.criteria["depth"]["L"].double())


def test_a_group_that_is_not_scored_is_the_norm_of_its_heads() -> None:
    heads = SCORES.criteria["b"]["Q"][1].double()
    wanted = [(heads[i] ** 2 + heads[i + 1] ** 2).sqrt() for i in (0, 2, 4)]
    torch.testing.assert_close(_asked(SCORES.criterion("b"), "K", 1), torch.stack(wanted))
    assert not torch.equal(_asked(SCORES.criterion("a"), "K", 1).float(), torch.stack(wanted))


def _ranked(x: torch.Tensor) -> list[float]:
    """1 for the best, 0 for the worst, by counting who is better."""
    values = x.tolist()
    better = [
        sum(other > mine or (other == mine and at < here) for at, other in enumerate(values))
        for here, mine in enumerate(values)
    ]
    return [1 - n / (len(values) - 1) for n in better]


@pytest.mark.parametrize(("text", "two"), [("a+2*b", 2.0), ("a + 2 * b", 2.0), ("a+0.5*b", 0.5)])
def test_a_composite_adds_weighted_ranks(text: str, two: float) -> None:
    a, b = (_ranked(SCORES.criteria[name]["Q"][0]) for name in "ab")
    wanted = torch.tensor([x + two * y for x, y in zip(a, b)], dtype=torch.float64)
    torch.testing.assert_close(_asked(SCORES.criterion(text), "Q", 0), wanted)


@pytest.mark.parametrize("weight", [-1.0, 2.0])
def test_the_weight_of_a_single_term_counts(weight: float) -> None:
    a = torch.tensor(_ranked(SCORES.criteria["a"]["Q"][0]), dtype=torch.float64)
    found = _asked(SCORES.criterion(f"{weight}*a"), "Q", 0)
    torch.testing.assert_close(found, weight * a)


def test_ranks_of_equal_scores_prefer_the_lower_index() -> None:
    tied = torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0, 1.0, 3.0, 0.0])
    scores = replace(SCORES, criteria={"a": {"D": tied}, "b": {"D": torch.ones(8)}})
    ranks = _asked(scores.criterion("a+0*b"), "D", None)
    assert ranks.argsort(descending=True).tolist() == [1, 3, 6, 4, 0, 2, 5, 7]
    assert ranks.tolist() == pytest.approx(_ranked(tied))


def test_an_axis_has_a_criterion_of_its_own() -> None:
    criterion = SCORES.criterion("hidden=a,heads=b,layers=depth")
    assert torch.equal(_asked(criterion, "D", None), SCORES.criteria["a"]["D"].double())
    assert torch.equal(_asked(criterion, "Q", 0), SCORES.criteria["b"]["Q"][0].double())
    assert torch.equal(_asked(criterion, "L", None), SCORES.criteria["depth"]["L"].double())


def test_what_has_no_criterion_of_its_own_has_the_common_one() -> None:
    criterion = SCORES.criterion("a,layers=depth")
    assert torch.equal(_asked(criterion, "F", 1), SCORES.criteria["a"]["F"][1].double())
    assert torch.equal(_asked(criterion, "L", None), SCORES.criteria["depth"]["L"].double())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wanda", "--criterion wanda: not in the scores, which hold a, b, depth"),
        ("a+wanda", "--criterion wanda: not in the scores"),
        ("heads=a+2*wanda", "--criterion wanda: not in the scores"),
        ("two*a", "--criterion two*a: 'two' is not a weight"),
        ("nan*a+b", "'nan' is not a weight"),
        ("depths=a", "'depths=a'; wanted NAME or AXIS=NAME, axes are hidden, heads, query-groups"),
        ("", "--criterion : ''; wanted NAME"),
        ("a,", "--criterion a,: ''; wanted NAME"),
        ("heads=", "'heads='; wanted NAME"),
        ("a,b", "--criterion a,b: all axes twice, a and b; wanted one, or both as a+b, or AXIS="),
        ("heads=a,b,heads=2*b", "heads twice, a and 2*b; wanted one, or both as a+2*b"),
    ],
)
def test_an_expression_that_is_none_is_refused(text: str, says: str) -> None:
    with pytest.raises(PlanError) as refused:
        SCORES.criterion(text)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("text", "axis", "says"),
    [
        ("b", "F", "--criterion b does not score ffn; those in the file that do: a"),
        ("depth", "Q", "does not score heads; those in the file that do: a, b"),
        ("a", "L", "does not score layers; those in the file that do: depth"),
        ("depth", "K", "does not score query-groups; those in the file that do: a, b"),
        ("heads=a", "F", "says nothing of ffn; add ffn=NAME (those in the file that do: a)"),
    ],
)
def test_an_axis_without_scores_is_refused_with_those_that_have_them(
    text: str, axis: str, says: str
) -> None:
    with pytest.raises(PlanError) as refused:
        _asked(SCORES.criterion(text), axis, None if axis == "L" else 0)
    assert says in str(refused.value)
