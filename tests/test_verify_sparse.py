"""`verify` of a sparse model: what it proves, and what it finds in one that is not what it says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_prune.model.grid import ParallelGrid
from tests.pico import assert_same, ok, refused, tensors
from tests.sparse import edit_record, make_sparse

Models, Shards = Callable[[str], Path], Callable[..., Path]
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
DOWN, UP = "model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight"
CANONICAL = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.fixture(scope="module")
def made(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``masked`` (2:4 of gqa), ``half`` (anywhere) or ``changed`` (2:4, kept weights others)."""
    root = tmp_path_factory.mktemp("sparse")
    how = {"masked": {}, "half": {"pattern": None}, "changed": {"changes_kept": True}}

    def sparse(kind: str) -> Path:
        if not (root / kind).exists():
            make_sparse(models("gqa"), root / kind, **how[kind])
        return root / kind

    return sparse


def edited(path: Path, copy: Path, name: str, edit: Callable[[Tensor], object]) -> Path:
    """A copy without a manifest, one tensor edited in place."""
    shutil.copytree(path, copy, ignore=shutil.ignore_patterns("manifest.json"))
    found = tensors(copy)
    edit(found[name])
    save_file(found, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("masked", "50.0000% of zeros as recorded, 2:4 in every group of 28"),
        ("half", "50.0000% of zeros as recorded, kept weights of 28 are the source's"),
        ("changed", "28 have the recorded SHA-256"),
    ],
)
def test_a_sparse_model_is_proved(kind: str, says: str, made, models: Models) -> None:
    out = ok("verify", "--load", made(kind), "--source", models("gqa")).out
    assert says in out and "files as in the manifest" in out


@pytest.mark.parametrize("kind", ["masked", "changed"])
@pytest.mark.parametrize("to", [("torch", 3, 2, "bf16"), ("torch_dist", 3, 1, "fp16")])
def test_it_stays_proved_in_every_format_layout_and_dtype(
    kind: str, to: tuple, made, models: Models, shards: Shards, tmp_path: Path
) -> None:
    ckpt_format, tp, pp, dtype = to
    flags = ("--to", "megatron", "--ckpt-format", ckpt_format, TP, tp, PP, pp, "--dtype", dtype)
    ok("convert", "--load", made(kind), "--save", tmp_path / "m", *flags)
    record = (made(kind) / "sparsity.json").read_bytes()
    assert [p.read_bytes() for p in (tmp_path / "m").rglob("sparsity.json")] == [record]
    source = shards("gqa", "torch_dist", 3, 1)
    assert (
        "all else is the source's" in ok("verify", "--load", tmp_path / "m", "--source", source).out
    )
    ok("reshard", "--load", tmp_path / "m", "--save", tmp_path / "r", TP, 1)
    ok("convert", "--load", tmp_path / "r", "--save", tmp_path / "hf", "--to", "hf")
    assert (tmp_path / "hf/sparsity.json").read_bytes() == record
    ok("verify", "--load", tmp_path / "hf", "--source", models("gqa"))


def test_it_is_written_as_shards_at_once(made, models: Models, tmp_path: Path) -> None:
    grid = ParallelGrid(tensor_parallel=3, pipeline_parallel=2)
    make_sparse(models("gqa"), tmp_path / "m", format="torch_dist", grid=grid)
    ok("verify", "--load", tmp_path / "m", "--source", models("gqa"))
    ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "hf", "--to", "hf")
    assert_same(tensors(tmp_path / "hf"), tensors(made("masked")))


def flip(x: Tensor) -> None:
    x[5, int(x[5].nonzero()[0])] *= 2


def set_one(x: Tensor) -> None:
    """A value where the source has another, in a group that stays as full as it may be."""
    at = int((x[7] == 0).nonzero()[0])
    x[7, int(x[7, at - at % 4 : at - at % 4 + 4].nonzero()[0]) + at - at % 4] = 0
    x[7, at] = 3.5


def one_zero_more(x: Tensor) -> None:
    x[5, int(x[5].nonzero()[0])] = 0


@pytest.mark.parametrize(
    ("kind", "name", "edit", "says"),
    [
        ("masked", DOWN, flip, f"{DOWN} at (5, "),
        ("masked", DOWN, flip, "a kept weight is the source's"),
        ("half", DOWN, flip, "a kept weight is the source's"),
        ("masked", DOWN, set_one, f"{DOWN} at (7, "),
        ("masked", DOWN, one_zero_more, f"{DOWN}: 2,305 of 4,608 weights are zero, sparsity.json "
         "says 2,304"),
        ("changed", DOWN, flip, f"{DOWN}: its SHA-256 is not the one sparsity.json has for it in"),
        ("changed", DOWN, lambda x: x[3, :4].fill_(1.0), f"{DOWN} at (3, 0) to (3, 3): 0 of 4"),
        ("changed", UP, lambda x: x.mul_(float("nan")), "values are not finite"),
        ("masked", "model.norm.weight", lambda x: x[3].add_(1), "model.norm.weight at (3,): is "),
        ("masked", "lm_head.weight", lambda x: x[300, 2].zero_(), "lm_head.weight at (300, 2): is "
         "0.0, the source's is"),
    ],
)  # fmt: skip
def test_what_is_not_as_recorded_is_named(
    kind: str, name: str, edit: Callable, says: str, made, models: Models, tmp_path: Path
) -> None:
    folder = edited(made(kind), tmp_path / "e", name, edit)
    message = refused("verify", "--load", folder, "--source", models("gqa"), says=says, code=3)
    assert str(folder) in message


def test_a_revived_zero_breaks_its_group(made, models: Models, tmp_path: Path) -> None:
    source = tensors(models("gqa"))[DOWN]

    def revive(x: Tensor) -> None:
        at = int((x[9] == 0).nonzero()[-1])
        x[9, at] = source[9, at]

    folder = edited(made("masked"), tmp_path / "e", DOWN, revive)
    says = "(9, 92) to (9, 95): 1 of 4 weights are zero; the pattern is 2:4"
    refused("verify", "--load", folder, "--source", models("gqa"), says=says, code=3)
    folder = edited(made("half"), tmp_path / "h", DOWN, revive)
    says = "2,303 of 4,608 weights are zero, sparsity.json says 2,304"
    refused("verify", "--load", folder, "--source", models("gqa"), says=says, code=3)


def test_zeros_of_the_source_stay(models: Models, tmp_path: Path) -> None:
    """Of a model that is sparse already: half of gate_proj, then all linears."""
    gate = lambda name: name.endswith("linear_fc1.gate.weight") or "gate" in name  # noqa: E731
    make_sparse(models("gqa"), tmp_path / "first", wanted=gate)
    make_sparse(tmp_path / "first", tmp_path / "second", changes_kept=True)
    ok("verify", "--load", tmp_path / "second", "--source", tmp_path / "first")
    gates = "model.layers.0.mlp.gate_proj.weight"
    zero = (tensors(tmp_path / "first")[gates] == 0).nonzero()[0].tolist()

    def revive(x: Tensor) -> None:
        x[tuple(zero)] = 1.0

    folder = edited(tmp_path / "second", tmp_path / "e", gates, revive)
    says = f"{gates} at {tuple(zero)}: is 1.0, the source's is 0.0; zeros stay"
    refused("verify", "--load", folder, "--source", tmp_path / "first", says=says, code=3)
    refused(
        "verify", "--load", tmp_path / "second", "--source", models("gqa"), says="its digest is"
    )


@pytest.mark.parametrize(
    ("changes", "says", "code"),
    [
        ({"source_digest": "0" * 64}, "made sparse from 000000000000...", 2),
        ({"reached": 0.25}, "reached is 0.25, its matrices come to 0.5", 3),
        ({"pattern": "4:2"}, "pattern is '4:2'; wanted N:M", 3),
        ({"reached": 1.5}, "reached is 1.5; wanted a share, 0 to 1", 3),
        ({"settings": []}, "settings is []; wanted a table", 3),
        ({"method": "a\nb"}, "method is 'a\\nb'; wanted a word", 3),
        ({"version": 2}, "of another version; this reads 1", 3),
        ({"tensors": {CANONICAL: {"asked": 0.5, "reached": 0.5, "sha256": 3}}}, "sha256 is 3", 3),
        ({"tensors": {CANONICAL: {"asked": 0.5, "reached": 0.5, "rows": 3}}}, "rows", 3),
        ({"tensors": {CANONICAL: {"asked": 0.5, "reached": "x"}}}, "reached is 'x'", 3),
        ({"tensors": {CANONICAL: {"asked": 0.5, "reached": 0.5, "energy": -1}}}, "energy is -1", 3),
        ({"tensors": {"decoder.final_layernorm.weight": {"asked": 0.5, "reached": 0.5}}},
         "names 'decoder.final_layernorm.weight'; wanted matrices of layers", 3),
        ({"tensors": {CANONICAL.replace("1", "9", 1): {"asked": 0.5, "reached": 0.5}}},
         "claims decoder.layers.9.mlp.linear_fc2.weight, which is no linear", 3),
        ({"tensors": {CANONICAL.replace("mlp.linear_fc2", "input_layernorm"): {
            "asked": 0.5, "reached": 0.5}}}, "input_layernorm.weight, which is no linear", 3),
        ({"tensors": {CANONICAL: {"asked": 0.5, "reached": 0.5}}}, "does not name this tensor", 3),
    ],
)  # fmt: skip
def test_an_edited_record_is_refused(
    changes: dict, says: str, code: int, made, models: Models, tmp_path: Path
) -> None:
    ignore = shutil.ignore_patterns("manifest.json")
    shutil.copytree(made("masked"), tmp_path / "e", ignore=ignore)
    edit_record(tmp_path / "e/sparsity.json", **changes)
    refused("verify", "--load", tmp_path / "e", "--source", models("gqa"), says=says, code=code)


def test_an_edited_hash_or_pattern_is_found(made, models: Models, tmp_path: Path) -> None:
    ignore = shutil.ignore_patterns("manifest.json")
    for number, (kind, key, value, says) in enumerate(
        (
            ("changed", "sha256", {"fp32": "0" * 64}, "its SHA-256 is not the one"),
            ("changed", "sha256", {"bf16": "0" * 64}, "its SHA-256 is not the one"),
            ("masked", "pattern", "1:4", "2 of 4 weights are zero; the pattern is 1:4"),
            ("masked", "pattern", "2:5", "the pattern is 2:5"),
        )
    ):
        folder = tmp_path / str(number)
        shutil.copytree(made(kind), folder, ignore=ignore)
        values = json.loads((folder / "sparsity.json").read_text())
        values["tensors"][CANONICAL][key] = value
        (folder / "sparsity.json").write_text(json.dumps(values))
        given = ("--load", folder, "--source", models("gqa"))
        assert DOWN in refused("verify", *given, says=says, code=3)


def test_another_configuration_or_file_is_found(made, models: Models, tmp_path: Path) -> None:
    shutil.copytree(made("masked"), tmp_path / "e")
    path, given = tmp_path / "e/config.json", ("--load", tmp_path / "e", "--source", models("gqa"))
    path.write_text(path.read_text().replace("50000", "60000"))
    says = "its configuration says rope_parameters {'rope_theta': 60000.0, 'rope_type': 'default'}"
    refused("verify", *given, says=says, code=3)
    shutil.copy(made("masked") / "config.json", path)
    tokenizer = tmp_path / "e/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("BPE", "EPB"))
    refused("verify", *given, says="tokenizer.json: its SHA-256 is not the manifest's", code=3)


def test_another_source_is_not_the_one(made, models: Models) -> None:
    says = "give the model that was sparsified"
    given = ("verify", "--load", made("masked"), "--source")
    refused(*given, models("twin"), says=says)
    refused(*given, made("masked"), says=says)


def test_what_a_plan_and_a_record_are_for_is_said(
    made, models: Models, plans: Callable[[str], Path], tmp_path: Path
) -> None:
    given = ("--source", models("gqa"), "--plan", plans("gqa"))
    ok("prune", "--load", models("gqa"), "--plan", plans("gqa"), "--save", tmp_path / "p",
       "--to", "hf")  # fmt: skip
    make_sparse(tmp_path / "p", tmp_path / "s")
    assert (tmp_path / "s/plan.json").read_bytes() == (tmp_path / "p/plan.json").read_bytes()
    ok("verify", "--load", tmp_path / "p", *given)
    ok("verify", "--load", tmp_path / "s", "--source", tmp_path / "p")
    says = "was made sparse after it was pruned (sparsity.json)"
    assert "--source PRUNED" in refused("verify", "--load", tmp_path / "s", *given, says=says)
    says = "has no sparsity.json, so it is not known to be sparse; give the plan"
    refused("verify", "--load", tmp_path / "p", "--source", models("gqa"), says=says)


def test_a_trained_model_is_trained_and_not_damaged(made, models: Models, tmp_path: Path) -> None:
    """By the commands that travel with it; those that its source has too tell of no training."""
    line = {"iteration": 0, "processes": 1, "argv": ["train"], "version": "0"}
    folder = edited(made("masked"), tmp_path / "t", DOWN, one_zero_more)
    (folder / "commands.jsonl").write_text(json.dumps(line) + "\n")
    given = ("--load", folder, "--source", models("gqa"))
    message = refused("verify", *given, says="was trained since it was made sparse")
    assert "41,473 weights are zero, 41,472 were; the pattern holds in 28 of 28" in message
    source = shutil.copytree(models("gqa"), tmp_path / "source")
    shutil.copy(folder / "commands.jsonl", source)
    make_sparse(source, tmp_path / "s")
    assert (tmp_path / "s/commands.jsonl").read_text() == json.dumps(line) + "\n"
    ok("verify", "--load", tmp_path / "s", "--source", source)


def test_a_dtype_that_is_too_narrow_may_add_zeros_and_no_more(
    models: Models, tmp_path: Path
) -> None:
    """1e-9 is 0 in fp16: such a kept weight is no lost one, and counts as no recorded zero."""
    small = edited(models("gqa"), tmp_path / "small", DOWN, lambda x: x[0, :4].fill_(1e-9))
    make_sparse(small, tmp_path / "s", wanted=lambda name: name == CANONICAL)
    to = ("--to", "hf", "--dtype", "fp16")
    ok("convert", "--load", tmp_path / "s", "--save", tmp_path / "c", *to)
    ok("verify", "--load", tmp_path / "c", "--source", small)
    lost = edited(tmp_path / "c", tmp_path / "lost", DOWN, lambda x: x[3:6].zero_())
    refused("verify", "--load", lost, "--source", small, says="sparsity.json says 2,304", code=3)
    assert torch.equal(tensors(tmp_path / "c")[DOWN][0, :4], torch.zeros(4, dtype=torch.float16))
