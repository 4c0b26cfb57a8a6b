"""Outputs appear whole or not at all.

Everything is written into a temporary directory beside the target, flushed to disk, described by a
manifest (sizes and SHA-256), and renamed. A temporary is locked while its writer lives, so the next
run can tell an abandoned one and sweep it, and a second writer is refused. With ``overwrite`` the
old output steps aside only once the new one is complete; a kill between the two renames is undone
by the next run.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from glob import escape
from pathlib import Path
from typing import Any

from megatron_prune import __version__
from megatron_prune.errors import ConfigError, DamagedError, StorageError
from megatron_prune.files import (
    FileRecord,
    flush_path,
    hash_file,
    one_at_a_time,
    try_lock,
    write_file,
)
from megatron_prune.files.parsing import checked_as, read_table
from megatron_prune.ranks import Ranks
from megatron_prune.sources.source import CARD

MANIFEST = "manifest.json"
WRITER = "megatron_prune"  # how our manifests are told from other files of that name


def write_manifest(
    directory: Path, facts: Mapping[str, Any], known: Mapping[str, FileRecord] | None = None
) -> None:
    """Describe every file under ``directory`` in its manifest.json, apart from the model card:
    that is for people to write on, and a change of it is no damage.

    Files in ``known`` were hashed while they were written; the others are read once and flushed.
    """
    records = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        name = path.relative_to(directory).as_posix()
        if name == MANIFEST or path.name == CARD:
            continue
        record = (known or {}).get(name)
        if record is None:
            record = hash_file(path)
            flush_path(path)
        records[name] = asdict(record)
    manifest = {"version": 1, "writer": f"{WRITER} {__version__}", **facts, "files": records}
    write_file(directory / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(directory: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    """The facts of a directory's manifest, and its files.

    Raises:
        DamagedError: it cannot be read, or is not a manifest of ours.
    """
    facts = read_table(directory / MANIFEST, DamagedError, "not a manifest")
    if not str(writer := facts.get("writer")).startswith(WRITER):
        raise DamagedError(
            f"{directory / MANIFEST}: its writer is {writer!r:.40}; wanted {WRITER}. Rename it if "
            "another program wrote it"
        )
    with checked_as(DamagedError, directory / MANIFEST, "not a manifest"):
        files = facts.pop("files")
        return facts, {str(n): FileRecord(int(r["bytes"]), r["sha256"]) for n, r in files.items()}


def check_manifest(directory: Path, *, hashes: bool = True) -> list[str]:
    """Compare every file with the manifest; returns one sentence per difference.

    Args:
        hashes: read every byte; else only look at names and sizes.

    Raises:
        DamagedError: the manifest itself cannot be read.
    """
    differences = []
    for name, record in read_manifest(directory)[1].items():
        path = directory / name
        if not path.is_file():
            differences.append(f"{path}: in the manifest, not on disk")
        elif path.stat().st_size != record.bytes:
            differences.append(f"{path}: {path.stat().st_size} bytes, manifest says {record.bytes}")
        elif hashes and hash_file(path).sha256 != record.sha256:
            differences.append(f"{path}: its SHA-256 is not the manifest's")
    return differences


def _is_used(target: Path) -> bool:
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def check_target(target: Path, *, overwrite: bool, flag: str = "--save") -> None:
    """Refuse an output path before any work.

    Raises:
        ConfigError: it exists and is not empty, or is a file.
        StorageError: its place is missing or cannot be written.
    """
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{flag} {target}: is a file; wanted a directory that does not exist yet")
    more = " or use --overwrite" if flag == "--save" else ""
    if _is_used(target) and not overwrite:
        raise ConfigError(f"{flag} {target}: exists and is not empty; remove it{more}")
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK | os.X_OK) or os.statvfs(parent).f_flag & os.ST_RDONLY:
        raise StorageError(f"{flag} {target}: {parent} cannot be written; choose another place")


def sweep_beside(target: Path) -> None:
    """Remove what dead writers left beside the target, and put back what they had set aside."""
    if target.parent.is_dir():
        with one_at_a_time(target.parent):
            _sweep(target)


def _sweep(target: Path) -> None:
    for old in target.parent.glob(f".{escape(target.name)}.old.*"):
        if target.exists():  # its writer may be removing it, too
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)
    for temporary in target.parent.glob(f".{escape(target.name)}.tmp.*"):
        if temporary.is_dir() and (handle := try_lock(temporary)) is not None:
            shutil.rmtree(temporary)
            os.close(handle)


def _publish(temporary: Path, target: Path) -> None:
    for directory, _, _ in os.walk(temporary):  # its files are flushed, their names not yet
        flush_path(Path(directory))
    old = None
    with one_at_a_time(target.parent):  # nobody takes what is aside for a dead writer's
        if target.exists():
            if _is_used(target):
                old = target.with_name(f".{target.name}.old.{secrets.token_hex(4)}")
                os.rename(target, old)
            else:
                target.rmdir()
        os.rename(temporary, target)
    flush_path(target.parent)
    if old is not None:  # the next writer may be sweeping it already
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_directory(target: Path, *, ranks: Ranks, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes ``target`` when the block ends without an error.

    The block runs on every rank with the same path; it must flush what it writes (`HashedFile`,
    `write_file` and `write_manifest` do). An error on any rank raises on all of them and leaves
    no trace.
    """
    target = target.absolute()
    temporary, lock, error = target, None, None
    try:
        if ranks.is_first:
            temporary, lock = _start(target, overwrite)
    except Exception as caught:  # handed to every rank by fail_together
        error = caught
    ranks.fail_together(error)
    temporary = ranks.gather(temporary)[0]
    try:
        try:
            yield temporary
        except Exception as caught:
            error = caught
        ranks.fail_together(error)
        if ranks.is_first:
            _publish(temporary, target)
    except OSError as caught:
        raise StorageError(f"{target}: {caught.strerror}; nothing was written") from caught
    finally:
        if lock is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            os.close(lock)
    ranks.barrier()


@contextmanager
def scratch_directory(target: Path, *, ranks: Ranks) -> Iterator[Path]:
    """A directory beside the target for what all ranks share on the way; gone at the end.

    Swept like any temporary of the target when its writer was killed.
    """
    target, scratch, lock, error = target.absolute(), target, None, None
    try:
        if ranks.is_first:
            scratch, lock = _start(target, overwrite=True)  # the target itself is checked elsewhere
    except Exception as caught:  # handed to every rank by fail_together
        error = caught
    ranks.fail_together(error)
    scratch = ranks.gather(scratch)[0]
    try:
        yield scratch
    finally:
        if lock is not None:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _start(target: Path, overwrite: bool) -> tuple[Path, int]:
    """A new temporary and its lock; no other process has one of the same target."""
    if not target.parent.exists():
        check_target(target, overwrite=overwrite)  # before its parents are made
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(target.parent):
            _sweep(target)
            _refuse_other_writers(target)
            check_target(target, overwrite=overwrite)
            temporary = target.with_name(f".{target.name}.tmp.{_me()}.{secrets.token_hex(4)}")
            temporary.mkdir()
            lock = try_lock(temporary)
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror}") from error
    if lock is None:
        raise StorageError(f"{temporary}: cannot be locked; choose a file system that can (flock)")
    return temporary, lock


def _me() -> str:
    return f"{os.getpid()}@{socket.gethostname()}"


def _refuse_other_writers(target: Path) -> None:
    for temporary in target.parent.glob(f".{escape(target.name)}.tmp.*"):
        holder = temporary.name.removeprefix(f".{target.name}.tmp.").rpartition(".")[0]
        if holder == _me() or not temporary.is_dir():  # our own scratch; a small file's
            continue
        if (handle := try_lock(temporary)) is not None:  # left by one that has died meanwhile
            os.close(handle)
            continue
        process, _, host = holder.partition("@")
        who = f"process {process} on {host}" if host else "another process"
        raise ConfigError(
            f"--save {target}: {who} is writing it; wait for it, or choose another place"
        )
