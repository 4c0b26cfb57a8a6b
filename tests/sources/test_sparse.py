"""What `SparseSource` says and reads, and who carries its record."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_prune.errors import CheckpointError
from megatron_prune.model.lora import Lora
from megatron_prune.planning.plan import Kept, PrunePlan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.replaced import Tensors
from megatron_prune.sources.rotated import RotatedSource
from megatron_prune.sources.source import CastSource
from megatron_prune.sources.sparse import CountedSource, SparseSource
from megatron_prune.sources.sparsity_record import load_sparsity
from megatron_prune.store import open_source
from tests.pico import ok
from tests.sparse import make_sparse

Models, Shards = Callable[[str], Path], Callable[..., Path]
PROJ = "decoder.layers.1.self_attention.linear_proj.weight"


def test_it_reads_what_is_replaced_and_the_rest_through(shards: Shards, tmp_path: Path) -> None:
    source = open_source(shards("gqa", "torch_dist", 3, 1))
    source.plan_path, source.has_optimizer_state = tmp_path / "plan.json", True
    source.lora, source.iteration = Lora(rank=1, alpha=1.0, targets=("linear_qkv",)), 7
    replaced, new = Tensors(tmp_path), torch.arange(48.0 * 48).view(48, 48)
    replaced.put(PROJ, new)
    sparse = SparseSource(source, replaced, tmp_path / "not there yet")
    assert torch.equal(sparse.read(PROJ), new)
    assert torch.equal(sparse.read(PROJ, 1, 3), new[:, 8:24])  # heads of 8 channels, split inputs
    other = PROJ.replace("1", "2", 1)
    assert torch.equal(sparse.read(other), source.read(other))
    assert (sparse.lora, sparse.has_optimizer_state) == (None, False)
    assert (sparse.plan_path, sparse.iteration) == (source.plan_path, 7)
    assert sparse.sparsity_path == tmp_path / "not there yet" and source.sparsity_path is None
    assert set(sparse.companion_files) == {*source.companion_files, "sparsity.json"}
    assert sparse.digest != source.digest


@pytest.fixture(scope="module")
def sparse(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sparse") / "hf"
    make_sparse(models("gqa"), path)
    return path


def test_other_weights_leave_the_record_behind(sparse: Path) -> None:
    source = open_source(sparse)
    shape = source.config.shape
    plan = PrunePlan(
        source=shape, kept=Kept(layers=(0, 2)), source_digest=source.digest,
        criterion="random", seed=1, prune_type="balance", balance_for=1,
    )  # fmt: skip
    rotated = RotatedSource(source, torch.eye(shape.hidden_size), {})
    for other in (PrunedSource(source, plan), rotated):
        assert other.sparsity_path is None
        assert {*other.companion_files, "sparsity.json"} == set(source.companion_files)
    assert (
        CastSource(source, "bf16").sparsity_path == source.sparsity_path == sparse / "sparsity.json"
    )


def test_zeros_are_counted_as_they_are_read_and_no_samples(sparse: Path) -> None:
    source = open_source(sparse)
    counted = CountedSource(source, [PROJ])
    assert counted.digest == source.digest and counted.size == 0
    counted.read("output_layer.weight")
    counted.read(PROJ, 1, 3)
    assert (counted.zeros, counted.size) == (48 * 8, 48 * 16)


def test_a_second_record_takes_the_place_of_the_first(sparse: Path, tmp_path: Path) -> None:
    second = make_sparse(sparse, tmp_path / "s", pattern=None, method="magnitude")
    found = load_sparsity(tmp_path / "s/sparsity.json")
    assert found == second and found.method == "magnitude"


@pytest.mark.parametrize("text", ["{}", "not JSON", '{"version": 1, "method": "x"}', "[1]"])
def test_another_programs_file_of_the_name_is_left_out(
    text: str, models: Models, tmp_path: Path
) -> None:
    shutil.copytree(models("gqa"), tmp_path / "m")
    (tmp_path / "m/sparsity.json").write_text(text)
    done = ok("convert", "--load", tmp_path / "m", "--save", tmp_path / "o", "--to", "hf")
    assert "left out, as transformers does: sparsity.json" in done.err
    assert not (tmp_path / "o/sparsity.json").exists()


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_a_record_that_is_a_link_out_is_refused(kind: str, sparse: Path, tmp_path: Path) -> None:
    root = tmp_path / "m"
    ok("convert", "--load", sparse, "--save", root, "--to", kind)
    path = next(root.rglob("sparsity.json"))
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="sparsity.json is a link out of"):
        open_source(root)


def test_words_name_the_method_and_what_it_did(sparse: Path, tmp_path: Path) -> None:
    values = json.loads((sparse / "sparsity.json").read_text())

    def words(method: str, pattern: str | None, **settings: object) -> str:
        changed = {"method": method, "pattern": pattern, "settings": settings}
        (tmp_path / "s.json").write_text(json.dumps(values | changed))
        return load_sparsity(tmp_path / "s.json").words

    assert words("wanda", "2:4", weight_update="none") == "wanda, 2:4"
    assert words("wanda", None, variant=True) == "wanda (variant)"
    assert words("magnitude", "4:8", weight_update="iter", refit=True) == (
        "magnitude (weight update iter, refit), 4:8"
    )
    assert words("alps", None, sparsity_by_layer="owl", true_sequential=True, refit=False) == (
        "alps (sparsity by layer owl, true sequential)"
    )
    assert words("alps", None, sparsity_by_layer="uniform") == "alps"
    assert words("alps", None, sparsity_by_layer="../shares.yaml") == "alps"
    assert words("alps", None, weight_update={"a": "`b`\n"}) == "alps"
