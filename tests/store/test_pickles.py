"""Pickles from strangers: nothing in them runs, is imported or called (F11).

Each payload leaves a canary file where it is run.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import io
import os
import pathlib
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_prune.errors import DamagedError
from megatron_prune.store.untrusted import BoundedUnpickler, load_untrusted
from tests.pico import assert_same, ok, refused, run, stock_copy, tensors

Models, Shards = Callable[[str], Path], Callable[..., Path]


class Reduced:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(canary: Path) -> dict[str, Any]:
    touch, code = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    return {
        "os.system": Reduced(os.system, touch),
        "eval": Reduced(eval, code),
        "exec": Reduced(exec, code),
        "subprocess": Reduced(subprocess.check_call, ["touch", str(canary)]),
        "open": Reduced(open, str(canary), "w"),
        "partial": Reduced(functools.partial(os.system, touch)),
        "getattr": Reduced(builtins.getattr, pathlib.PosixPath(canary), "touch"),
        "import": Reduced(importlib.import_module, "evil_module"),
        "nested": {"a": [Reduced(os.system, touch)]},
    }


def bare_pickle(name: str, canary: Path) -> bytes:
    return pickle.dumps(payloads(canary)[name], protocol=2)


NAMES = sorted(payloads(Path("x")))


@pytest.fixture()
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The canary; a module that makes it when it is imported lies on the path."""
    canary = tmp_path / "canary"
    (tmp_path / "path").mkdir()
    (tmp_path / "path/evil_module.py").write_text(f"open({str(canary)!r}, 'w').close()")
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    yield canary
    sys.modules.pop("evil_module", None)


@pytest.mark.parametrize("name", NAMES)
def test_the_payloads_work(name: str, evil: Path) -> None:
    """The control: pickle runs them all. One only builds what the file would call next."""
    found = pickle.loads(bare_pickle(name, evil))
    if name == "getattr":
        found()
    assert evil.exists()


def harmless(path: Path, file: Path, canary: Path) -> None:
    """No stage runs it, imports it or breaks on it; the last reads the weights."""
    for stage in (
        ("inspect", path),
        ("convert", "--load", path, "--save", path.parent / "out", "--to", "hf"),
    ):
        done = run(*stage)
        assert not canary.exists(), f"the payload ran at {stage[0]}"
        assert "evil_module" not in sys.modules
        assert done.code in (2, 3) and str(file) in done.err, done
    assert not (path.parent / "out").exists()


def copies(source: Path, target: Path) -> list[Path]:
    """A stranger's checkpoint, and one of ours tampered with."""
    return [
        stock_copy(source, target / "stranger"),
        Path(shutil.copytree(source, target / "ours")),
    ]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", ["state", "args", "bare"])
def test_a_payload_in_a_legacy_file_is_not_executed(
    name: str, place: str, shards: Shards, tmp_path: Path, evil: Path
) -> None:
    for path in copies(shards("gqa", "torch", 3, 1), tmp_path):
        file = path / "iter_0000001/mp_rank_01/model_optim_rng.pt"
        if place == "args":
            file = path / "iter_0000001/mp_rank_00/model_optim_rng.pt"
        state, payload = torch.load(file, weights_only=False), payloads(evil)[name]
        if place == "bare":
            file.write_bytes(bare_pickle(name, evil))
        else:
            torch.save({**state, "args" if place == "args" else "x": payload}, file)
        harmless(path, file, evil)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [True, False])
def test_a_payload_in_common_pt_is_not_executed(
    name: str, bare: bool, shards: Shards, tmp_path: Path, evil: Path
) -> None:
    for path in copies(shards("gqa", "torch_dist", 3, 1), tmp_path):
        file = path / "iter_0000001/common.pt"
        if bare:
            file.write_bytes(bare_pickle(name, evil))
        else:
            torch.save({"args": payloads(evil)[name], "iteration": 0}, file)
        harmless(path, file, evil)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("inside", [True, False])
def test_a_payload_in_the_index_is_not_executed(
    name: str, inside: bool, shards: Shards, tmp_path: Path, evil: Path
) -> None:
    """Megatron's reader and torch's DCP both run it."""
    for path in copies(shards("gqa", "torch_dist", 3, 1), tmp_path):
        file = path / "iter_0000001/.metadata"
        if inside:
            index = pickle.loads(file.read_bytes())
            index.planner_data = payloads(evil)[name]
            file.write_bytes(pickle.dumps(index))
        else:
            file.write_bytes(bare_pickle(name, evil))
        harmless(path, file, evil)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bare", [True, False])
def test_a_payload_in_pytorch_bin_is_not_executed(
    name: str, bare: bool, models: Models, tmp_path: Path, evil: Path
) -> None:
    path = Path(shutil.copytree(models("gqa"), tmp_path / "c"))
    (path / "model.safetensors").unlink()
    file = path / "pytorch_model.bin"
    if bare:
        file.write_bytes(bare_pickle(name, evil))
    else:
        torch.save({"model.norm.weight": payloads(evil)[name]}, file)
    harmless(path, file, evil)


@pytest.mark.parametrize("name", NAMES)
def test_a_payload_in_a_chunk_is_not_executed(
    name: str, shards: Shards, tmp_path: Path, evil: Path
) -> None:
    """The index is changed too, so that the payload is where the reader looks."""
    path = stock_copy(shards("gqa", "torch_dist", 3, 1), tmp_path / "c")
    file = path / "iter_0000001/__0_0.distcp"
    start = file.stat().st_size
    with open(file, "ab") as out:
        torch.save(payloads(evil)[name], out)
    index = pickle.loads((file.parent / ".metadata").read_bytes())
    for place, info in index.storage_data.items():
        if place.fqn == "decoder.final_layernorm.weight":
            info.offset, info.length = start, file.stat().st_size - start
    (file.parent / ".metadata").write_bytes(pickle.dumps(index))
    done = run("convert", "--load", path, "--save", tmp_path / "out", "--to", "hf")
    assert not evil.exists()
    assert done.code == 3 and str(file) in done.err, done


def test_names_that_megatrons_own_files_use_are_inert_stand_ins(
    shards: Shards, tmp_path: Path, evil: Path
) -> None:
    """numpy, pathlib and megatron names are not refused, and neither imported nor called."""

    class ByName:
        def __reduce__(self) -> Any:
            import numpy.f2py.crackfortran as crackfortran

            return crackfortran.myeval, (f"open({str(evil)!r}, 'w').close()",)

    path = stock_copy(shards("gqa", "torch_dist", 3, 1), tmp_path / "c")
    file = path / "iter_0000001/common.pt"
    state = torch.load(file, weights_only=False)
    state["rng_state"] = [ByName(), pathlib.PosixPath("/x")]
    torch.save(state, file)
    sys.modules.pop("numpy.f2py.crackfortran", None)
    assert run("inspect", path).code == 0
    assert not evil.exists() and "numpy.f2py.crackfortran" not in sys.modules


class Registered:
    """A class that a library has told torch to build."""

    made = 0

    def __init__(self, *_: object) -> None:
        Registered.made += 1

    def __reduce__(self) -> Any:
        return Registered, (1,)


def test_what_libraries_let_torch_build_is_not_built(tmp_path: Path) -> None:
    """megatron-core registers a dozen classes when it is imported, torch its meshes of devices."""
    torch.save({"x": Registered()}, tmp_path / "x.pt")
    before = Registered.made
    with torch.serialization.safe_globals([Registered]):
        torch.load(tmp_path / "x.pt", weights_only=True)
        assert Registered.made == before + 1
        with pytest.raises(DamagedError, match="Registered, which no model needs"):
            load_untrusted(tmp_path / "x.pt", mmap=False)
        assert Registered.made == before + 1
        assert Registered in torch.serialization.get_safe_globals()


def test_arguments_are_kept_as_values_and_classes_as_stand_ins(
    shards: Shards, tmp_path: Path
) -> None:
    """A stock checkpoint names argument classes that we neither have nor need."""
    import types

    module = types.ModuleType("megatron.nothing")
    module.Kind = type("Kind", (), {"__module__": "megatron.nothing"})
    sys.modules["megatron.nothing"] = module
    try:
        path = stock_copy(shards("gqa", "torch", 3, 1), tmp_path / "c")
        for file in path.glob("iter_*/mp_rank_*/*.pt"):
            state = torch.load(file, weights_only=False)
            state["args"].model_type = module.Kind()
            torch.save(state, file)
    finally:
        del sys.modules["megatron.nothing"]
    done = run("inspect", path)
    assert done.code == 0 and "hidden_size                   48" in done.out, done


def test_an_index_has_the_bytes_of_torchs_own_records(models, tmp_path: Path) -> None:
    to = ("--to", "megatron", "--tensor-model-parallel-size", 3)
    ok("convert", "--load", models("gqa"), "--save", tmp_path, *to)
    data = next(tmp_path.rglob(".metadata")).read_bytes()
    index = pickle.loads(data)
    assert type(index) is Metadata and len(index.storage_data) > 40
    assert pickle.dumps(index, protocol=4) == data


@pytest.mark.parametrize("format", ["bin", "torch"])
def test_tensors_of_torch_are_read_as_their_values(
    format: str, models: Models, shards: Shards, tmp_path: Path
) -> None:
    """A parameter asks for a gradient, and a lazy negation has turned no sign: numpy takes none."""

    def like_a_program(x: torch.Tensor) -> torch.Tensor:
        return torch._neg_view(-x) if x.dim() == 1 else torch.nn.Parameter(x)

    wanted, path = tensors(models("gqa")), tmp_path / "c"
    if format == "bin":
        shutil.copytree(models("gqa"), path, ignore=shutil.ignore_patterns("*.safetensors"))
        stored = {name: like_a_program(x) for name, x in wanted.items()}
        torch.save(stored, path / "pytorch_model.bin")
    else:
        shutil.copytree(shards("gqa", "torch", 1, 1), path)
        (file,) = path.glob("iter_*/mp_rank_00/*.pt")
        state = torch.load(file, weights_only=False)
        state["model"] = {
            name: x if x is None else like_a_program(x) for name, x in state["model"].items()
        }
        torch.save(state, file)
        next(path.glob("iter_*/manifest.json")).unlink()
    ok("plan", "--load", path, "--save", tmp_path / "plan.json", "--ffn-hidden-size-remain", 64)
    ok("convert", "--load", path, "--save", tmp_path / "out", "--to", "hf")
    assert_same(tensors(tmp_path / "out"), wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x.to_sparse(), "is torch.sparse_coo; wanted plain values"),
        (lambda x: x.to_sparse_csr(), "is torch.sparse_csr; wanted plain values"),
        (lambda x: x.to("meta"), "is on device meta; wanted plain values"),
        (lambda x: torch.nested.nested_tensor([x[0], x[1]]), "is nested; wanted plain values"),
    ],
)
def test_tensors_of_torch_without_plain_values_are_named(
    change: Callable[[torch.Tensor], torch.Tensor], says: str, models: Models, tmp_path: Path
) -> None:
    stored = tensors(models("gqa"))
    stored["model.norm.weight"] = change(stored["lm_head.weight"])
    shutil.copy(models("gqa") / "config.json", tmp_path)
    torch.save(stored, tmp_path / "pytorch_model.bin")
    refused("inspect", tmp_path, says=f"model.norm.weight {says}")


def test_a_torch_file_with_numbers_for_names_is_refused(models: Models, tmp_path: Path) -> None:
    shutil.copy(models("gqa") / "config.json", tmp_path)
    torch.save({**tensors(models("gqa")), 5: torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    refused("inspect", tmp_path, says="something other than named tensors", code=3)


@pytest.mark.parametrize(
    "data", [b"\x80\x04K\x01r\xff\xff\xff\x3f.", b"\x80\x05\x96" + (1 << 34).to_bytes(8, "little")]
)
def test_a_few_bytes_do_not_ask_for_gigabytes(data: bytes) -> None:
    """C's unpickler takes 16 GB for a place that far back, or an array of such length."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with suppress(Exception):
        BoundedUnpickler(io.BytesIO(data)).load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (100 << 10)
