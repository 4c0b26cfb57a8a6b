"""Outputs appear whole or not at all, and what was there before is safe (F1, F3, F4, F27)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_prune import files
from megatron_prune.errors import StorageError
from megatron_prune.ranks import Ranks
from megatron_prune.store import commit, passenger
from tests.launch import fork_and_wait, launch
from tests.pico import directory_bytes, ok, refused, run

Models = Callable[[str], Path]
TARGETS = {
    "hf": ("--to", "hf", "--max-shard-size", "100KB"),
    "torch_dist": ("--to", "megatron", "--tensor-model-parallel-size", 3),
    "torch": ("--to", "megatron", "--tensor-model-parallel-size", 3, "--ckpt-format", "torch"),
}
each_target = pytest.mark.parametrize("target", sorted(TARGETS))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- where it is written


def test_a_target_in_use_is_refused_without_overwrite(models: Models, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    given = ("convert", "--load", models("gqa"), "--to", "hf", "--save", tmp_path / "out")
    refused(*given, says=f"--save {tmp_path / 'out'}: exists and is not empty; remove it or use")
    assert names(tmp_path / "out") == ["mine"]
    ok(*given, "--overwrite")
    assert "mine" not in names(tmp_path / "out") and names(tmp_path) == ["out"]


def test_an_empty_directory_and_missing_parents_are_taken(models: Models, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("empty", "a/b/c"):
        ok("convert", "--load", models("gqa"), "--to", "hf", "--save", tmp_path / place)
        assert (tmp_path / place / "config.json").exists()


def test_a_relative_target_lies_in_the_working_directory(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ok("convert", "--load", models("gqa"), "--to", "hf", "--save", "out")
    assert names(tmp_path) == ["out"]


def test_a_target_that_is_the_input_or_holds_it_is_refused(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("gqa"), tmp_path / "a/source"))
    before = directory_bytes(tmp_path)
    for place in (source, source / "x", tmp_path / "a", source / ".." / "source"):
        given = ("--save", place, "--to", "hf", "--overwrite")
        refused("convert", "--load", source, *given, says="inputs never change")
    assert directory_bytes(tmp_path) == before


def test_a_file_as_target_is_refused(models: Models, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    given = ("--to", "hf", "--overwrite", "--save", tmp_path / "out")
    refused("convert", "--load", models("gqa"), *given, says="is a file; wanted a directory")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_place_that_cannot_be_written_exits_4(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the way, a read-only file system, a directory that refuses (tests run as root)."""
    (tmp_path / "file").write_text("")
    given = ("convert", "--load", models("gqa"), "--to", "hf", "--save")
    refused(*given, tmp_path / "file/out", says=str(tmp_path / "file"), code=4)
    (tmp_path / "file").chmod(0o755)
    refused(*given, tmp_path / "file/out", says=str(tmp_path / "file"), code=4)

    read_only = os.statvfs_result((4096, 4096, 9, 9, 9, 9, 9, 9, os.ST_RDONLY, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: read_only)
        refused(*given, tmp_path / "out", says="cannot be written; choose another", code=4)
    with monkeypatch.context() as patch:

        def mkdir(self: Path, *_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(self))

        patch.setattr(Path, "mkdir", mkdir)
        refused(*given, tmp_path / "out", says="Permission denied", code=4)
    assert names(tmp_path) == ["file"]


def test_too_little_room_is_noticed_before_writing(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    given = ("--to", "hf", "--save", tmp_path / "out")
    says = f"{tmp_path}: 0.0 GB free, 0.0 GB wanted; make room"
    refused("convert", "--load", models("gqa"), *given, says=says, code=4)
    assert names(tmp_path) == []


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write past ``size`` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@each_target
def test_a_full_disk_exits_4_and_leaves_what_was_there(
    target: str, models: Models, tmp_path: Path
) -> None:
    """At random bytes of the output, the first and the last of its largest file among them."""
    given = ("convert", "--to", *TARGETS[target][1:], "--save", tmp_path / "out")
    ok(*given, "--load", models("twin"))
    before, rng = directory_bytes(tmp_path / "out"), random.Random(0)
    largest = max(path.stat().st_size for path in (tmp_path / "out").rglob("*"))
    for size in (1, largest - 1, *(rng.randrange(largest) for _ in range(8))):
        with files_of_at_most(size):
            refused(*given, "--load", models("gqa"), "--overwrite", says="out", code=4)
        assert names(tmp_path) == ["out"] and directory_bytes(tmp_path / "out") == before


def test_a_plan_on_a_full_disk_exits_4_and_leaves_the_old_one(
    models: Models, tmp_path: Path
) -> None:
    given = ("plan", "--load", models("gqa"), "--save", tmp_path / "p.json", "--overwrite")
    ok(*given)
    before = (tmp_path / "p.json").read_bytes()
    with files_of_at_most(100):
        done = run(*given, "--hidden-size-remain", 24)
    assert done.code == 4 and "nothing was changed" in done.err
    assert (tmp_path / "p.json").read_bytes() == before and names(tmp_path) == ["p.json"]


# ---------------------------------------------------------------- when it appears


@each_target
def test_the_old_output_stays_until_the_new_one_is_complete_and_flushed(
    target: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, flushed, looked = tmp_path / "out", set[str](), []
    given = ("convert", *TARGETS[target], "--save", out)
    ok(*given, "--load", models("twin"))
    old = directory_bytes(out)
    ok("convert", *TARGETS[target], "--save", tmp_path / "wanted", "--load", models("gqa"))
    wanted = directory_bytes(tmp_path / "wanted")
    rename = os.rename

    def look(source: Path, place: Path) -> None:
        if Path(source) == out:
            assert directory_bytes(out) == old
            (temporary,) = tmp_path.glob(".out.tmp.*")
            assert directory_bytes(temporary) == wanted
            inside = {str(path) for path in temporary.rglob("*")} | {str(temporary)}
            assert inside <= flushed, inside - flushed
            looked.append(True)
        rename(source, place)

    monkeypatch.setattr(os, "fsync", lambda fd: flushed.add(os.readlink(f"/proc/self/fd/{fd}")))
    monkeypatch.setattr(os, "rename", look)
    ok(*given, "--load", models("gqa"), "--overwrite")
    assert looked and directory_bytes(out) == wanted
    assert str(tmp_path) in flushed, "the directory that the rename changed"
    assert names(tmp_path) == ["out", "wanted"]


@each_target
def test_an_error_while_writing_leaves_no_trace(
    target: str, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the manifest, which is the last to be written, and in any file before."""
    given = ("convert", *TARGETS[target], "--save", tmp_path / "out")
    ok(*given, "--load", models("twin"))
    before, write = directory_bytes(tmp_path / "out"), commit.write_file
    for name in ("manifest.json", "config.json"):

        def fail(path: Path, data: bytes, name: str = name) -> None:
            if path.name == name:
                raise OSError(5, "Input/output error")
            write(path, data)

        for module in (commit, passenger):
            monkeypatch.setattr(module, "write_file", fail)
        refused(*given, "--load", models("gqa"), "--overwrite", says="Input/output error", code=4)
        assert names(tmp_path) == ["out"] and directory_bytes(tmp_path / "out") == before


def test_a_kill_between_the_two_renames_is_undone_by_the_next_run(
    models: Models, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    stage = ("convert", "--to", "hf", "--save", out)
    ok(*stage, "--load", models("twin"))
    before = directory_bytes(out)
    prelude = """
rename = os.rename
def once(*args):
    rename(*args)
    os.kill(os.getpid(), 9)
os.rename = once
"""
    launch(1, (*stage, "--load", models("gqa"), "--overwrite"), prelude=prelude)
    assert not out.exists()
    assert [name.split(".")[2] for name in names(tmp_path)] == ["old", "tmp"]
    refused(*stage, "--load", models("gqa"), says="exists and is not empty")  # the old one is back
    assert names(tmp_path) == ["out"] and directory_bytes(out) == before
    ok(*stage, "--load", models("gqa"), "--overwrite")
    assert names(tmp_path) == ["out"] and directory_bytes(out) != before


def test_what_dead_writers_left_is_swept_and_what_live_ones_hold_is_not(
    models: Models, tmp_path: Path
) -> None:
    """Also of a name that is a pattern, and never of another output beside it."""
    out = tmp_path / "o[u]t*"
    for name in (".o[u]t*.tmp.dead", ".o[u]t*.tmp.live", ".out.tmp.other", ".o[u]t*.old.x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    live = os.open(tmp_path / ".o[u]t*.tmp.live", os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    given = ("convert", "--load", models("gqa"), "--to", "hf", "--save", out, "--overwrite")
    refused(*given, says="another process is writing it; wait for it")
    assert names(tmp_path) == [".o[u]t*.tmp.live", ".out.tmp.other", "o[u]t*"]
    os.close(live)
    ok(*given)
    assert names(tmp_path) == [".out.tmp.other", "o[u]t*"]


# ---------------------------------------------------------------- what it is


@each_target
def test_the_manifest_has_every_file_but_the_card_with_its_size_and_hash(
    target: str, models: Models, tmp_path: Path
) -> None:
    ok("convert", *TARGETS[target], "--load", models("gqa"), "--save", tmp_path / "out")
    (place,) = (tmp_path / "out").rglob("manifest.json")
    manifest = json.loads(place.read_text())
    found = {
        path.relative_to(place.parent).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in place.parent.rglob("*")
        if path.is_file() and path != place and path.name != "README.md"  # meant to be edited
    }
    assert manifest["files"] == found
    assert manifest["format"] == target and manifest["shape"]["vocab_size"] == 379
    assert manifest["family"] == "llama" and manifest["tied"] is False


@each_target
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_modes_honour_the_umask(target: str, umask: int, models: Models, tmp_path: Path) -> None:
    """safetensors' own writer leaves 0600."""
    before = os.umask(umask)
    try:
        ok("convert", *TARGETS[target], "--load", models("gqa"), "--save", tmp_path / "out")
        ok("plan", "--load", models("gqa"), "--save", tmp_path / "p.json")
    finally:
        os.umask(before)
    for path in (tmp_path / "out", tmp_path / "p.json", *(tmp_path / "out").rglob("*")):
        full = 0o777 if path.is_dir() else 0o666
        assert oct(stat.S_IMODE(path.stat().st_mode)) == oct(full & ~umask), path


def test_replace_file_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    files.replace_file(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StorageError, match=f"{path}: No space left on device; nothing was changed"):
        files.replace_file(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["f"]


# ---------------------------------------------------------------- scratch


def test_what_a_killed_plan_left_is_swept_and_what_a_live_writer_holds_is_not(
    models: Models, tmp_path: Path
) -> None:
    out = tmp_path / "p*n.json"
    stage = ("plan", "--load", models("gqa"), "--save", out)
    launch(1, stage, prelude="os.replace = lambda *args: os.kill(os.getpid(), 9)")
    (dead,) = names(tmp_path)
    assert dead.startswith(".p*n.json.tmp.")
    live = tmp_path / ".p*n.json.tmp.live"
    (tmp_path / ".plan.json.tmp.other").write_text("")
    with open(live, "x") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ok(*stage)
        assert names(tmp_path) == [".p*n.json.tmp.live", ".plan.json.tmp.other", "p*n.json"]
    ok(*stage, "--overwrite")
    assert names(tmp_path) == [".plan.json.tmp.other", "p*n.json"]


def test_a_small_file_is_locked_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two writers of one file: the second sweeps nothing of the first, the last one wins."""
    path, replace = tmp_path / "state", os.replace

    def other_writer_first(*args: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        files.replace_file(path, b"second")
        replace(*args)

    monkeypatch.setattr(os, "replace", other_writer_first)
    files.replace_file(path, b"first")
    assert path.read_bytes() == b"first" and names(tmp_path) == ["state"]


def test_scratch_lies_beside_the_target_and_is_gone_whatever_happens(tmp_path: Path) -> None:
    alone = Ranks(rank=0, world_size=1)
    with (
        pytest.raises(ZeroDivisionError),
        commit.scratch_directory(tmp_path / "out", ranks=alone) as scratch,
    ):
        assert scratch.parent == tmp_path
        (scratch / "file").write_text("x")
        commit.sweep_beside(tmp_path / "out")  # as writing the target itself does
        assert names(scratch) == ["file"]
        1 / 0  # noqa: B018
    assert names(tmp_path) == []


def test_the_scratch_of_a_dead_process_is_swept(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from megatron_prune.ranks import Ranks
from megatron_prune.store.commit import scratch_directory
with scratch_directory(Path(sys.argv[1]), ranks=Ranks(rank=0, world_size=1)):
    os._exit(9)
"""
    assert fork_and_wait({"code": script}, tmp_path / "out").returncode == 9
    assert len(names(tmp_path)) == 1
    commit.sweep_beside(tmp_path / "out")
    assert names(tmp_path) == []
