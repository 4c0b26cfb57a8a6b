"""Which files of a model's directory travel with its weights, and which stay behind.

What travels is what transformers' save_pretrained writes of a model, its tokenizer, processor and
generation config, or reads: every file at the top that is not weights, and two directories. Only
files that lie in the directory itself are taken, or in the hub's cache that it is part of: a link
to anything else would be copied out and might be published.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_prune.errors import CheckpointError
from megatron_prune.families.config import CONFIG
from megatron_prune.files.parsing import read_table
from megatron_prune.sources.source import FOLDING, REPAIR, SPARSITY
from megatron_prune.store.commit import MANIFEST, WRITER
from megatron_prune.store.passenger import PLAN

DIRECTORIES = ("additional_chat_templates", "custom_generate")
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)
_OURS = {  # how a file of ours is told from another program's of the same name
    PLAN: ("version", "kept", "source_digest"),
    REPAIR: ("version", "plan_digest", "tensors"),
    FOLDING: ("version", "plan_digest", "gates"),
    MANIFEST: ("writer", "files"),
    SPARSITY: ("version", "method", "source_digest", "tensors"),
}


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What lies beside a model.

    Attributes:
        files: relative name -> path of what travels; config.json apart.
        plan: the plan it was pruned with, None where there is none of ours.
        left: names of what neither is read nor travels.
    """

    files: dict[str, Path]
    plan: Path | None
    left: list[str]


def belongs_to(directory: Path, path: Path) -> bool:
    """Whether a file lies in a directory when links are followed; of a snapshot in the hub's cache
    also in the cache's own store."""
    roots = [directory.resolve()]
    if directory.parent.name == "snapshots":
        roots.append((directory.parent.parent / "blobs").resolve())
    return any(path.resolve().is_relative_to(root) for root in roots)


def find_companions(directory: Path, root: Path, weights: Collection[str] = ()) -> Companions:
    """What lies beside the config.json in ``directory``.

    Args:
        root: what a link must not lead out of: ``directory``, or the checkpoint that it is part of.
        weights: names of the files that are read as its weights.

    Raises:
        CheckpointError: a link leads out of ``root``.
    """
    files, left = {}, []
    for path in sorted(directory.iterdir()):
        name = path.name
        if name.startswith(".") or name in weights:
            continue
        if name in DIRECTORIES and path.is_dir():
            files.update({below.relative_to(directory).as_posix(): below for below in _below(path)})
        elif name in _OURS:
            if not _is_ours(path):
                left.append(name)
            elif name == SPARSITY:  # of the others each format has a place of its own
                files[name] = path
        elif path.is_dir():
            left.append(f"{name}/")
        elif name.endswith(_WEIGHTS):
            left.append(name)
        elif path.is_file() and name != CONFIG:
            files[name] = path
    _refuse_links(root, {**files, CONFIG: directory / CONFIG})
    return Companions(files=files, plan=find_plan(directory), left=left)


def find_plan(directory: Path) -> Path | None:
    """The plan in a directory, where it is one of ours.

    Raises:
        CheckpointError: it or a record beside it is a link out of the directory.
    """
    path = directory / PLAN
    if not path.is_file() or not _is_ours(path):
        return None
    _refuse_links(directory, {name: directory / name for name in (PLAN, REPAIR, FOLDING)})
    return path


def _refuse_links(root: Path, files: Mapping[str, Path]) -> None:
    for name, path in files.items():
        if not belongs_to(root, path):
            raise CheckpointError(
                f"{path.parent}: {name} is a link out of {root}; not followed, for what travels "
                "with a model may be published. Copy the file there, or remove the link"
            )


def _below(directory: Path) -> Iterator[Path]:
    return (
        path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")
    )


def _is_ours(path: Path) -> bool:
    try:
        values = read_table(path, CheckpointError)
    except CheckpointError:
        return False
    if not all(key in values for key in _OURS[path.name]):
        return False
    return path.name != MANIFEST or str(values["writer"]).startswith(WRITER)
