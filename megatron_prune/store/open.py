"""What lies at a path: Hugging Face, torch_dist or legacy; and its `Source`.

A Megatron root holds ``latest_checkpointed_iteration.txt`` and iteration directories. Ours keep the
model's companions (config, tokenizer) in ``hf/`` and its plan in ``plan.json`` inside the iteration
directory, so that one directory is one whole checkpoint. Stock checkpoints have neither and are
read by their arguments.
"""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizers import TRACKER
from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.families import read_config, read_config_as
from megatron_prune.families.config import CONFIG
from megatron_prune.files import Hold, hold
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelConfig
from megatron_prune.parsing import read_table
from megatron_prune.sources.source import REPAIR, Source
from megatron_prune.store import hf, mcore_dist, mcore_legacy
from megatron_prune.store.commit import MANIFEST, WRITER, check_manifest, read_manifest
from megatron_prune.store.lora import LoraSource, read_lora
from megatron_prune.store.megatron_args import config_from_args, warn_unverified
from megatron_prune.store.passenger import COMPANIONS, PLAN
from megatron_prune.store.untrusted import load_untrusted

_NOT_COMPANIONS = (
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


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """Where a checkpoint lies and what kind it is, before any tensor is looked at.

    Attributes:
        directory: the directory of the weights (an iteration directory for Megatron).
        format: hf, torch_dist or torch.
    """

    directory: Path
    format: str
    iteration: int = 0


def iteration_directory(root: Path) -> Path:
    """The iteration directory a Megatron root points to; ``root`` itself when it is one.

    Raises:
        CheckpointError: the tracker is unreadable or points to a directory that is not there.
    """
    tracker = root / TRACKER
    if not tracker.is_file():
        return root
    word = tracker.read_text(errors="replace").strip()
    if word != "release" and not re.fullmatch("[0-9]{1,9}", word):
        raise CheckpointError(f"{tracker}: {word[:40]!r}; wanted an iteration number or 'release'")
    directory = root / ("release" if word == "release" else f"iter_{int(word):07d}")
    if not directory.is_dir():
        raise CheckpointError(f"{tracker}: points to {directory.name}, which is not there")
    return directory


def read_facts(path: Path) -> CheckpointFacts:
    """Find out what lies at ``path``.

    Raises:
        CheckpointError: nothing is there, or nothing we know.
    """
    if not path.is_dir():
        what = "is a file; wanted a checkpoint directory" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {what}")
    directory = iteration_directory(path)
    match = re.fullmatch(r"iter_(\d+)", directory.name)
    iteration = int(match[1]) if match else 0
    if (directory / mcore_dist.INDEX).is_file() or (directory / mcore_dist.COMMON).is_file():
        return CheckpointFacts(directory=directory, format="torch_dist", iteration=iteration)
    if any(directory.glob("mp_rank_*")):
        return CheckpointFacts(directory=directory, format="torch", iteration=iteration)
    if (directory / CONFIG).is_file() or any(
        (directory / name).is_file() for name in (hf.SINGLE, hf.INDEX, hf.BIN_SINGLE, hf.BIN_INDEX)
    ):
        return CheckpointFacts(directory=directory, format="hf")
    raise CheckpointError(
        f"{path}: no config.json, no .metadata and no mp_rank_* directories; wanted a Hugging Face "
        "directory or a Megatron checkpoint"
    )


def open_source(path: Path, *, family: str | None = None) -> Source:
    """Open any checkpoint. Reads configuration and headers, no tensor.

    Args:
        family: for a stock Megatron checkpoint whose arguments do not tell.

    Raises:
        CheckpointError: nothing we read lies there.
        DamagedError: what lies there is incomplete or contradicts itself.
    """
    facts, held = _read_and_hold(path)
    if facts.format == "hf":
        source = _open_hf(facts.directory)
    elif facts.format == "torch_dist":
        source = _open_dist(facts, family)
    else:
        source = _open_legacy(facts, family)
    source.held = held
    _check_described(facts.directory, source.config)
    return source


def _read_and_hold(path: Path) -> tuple[CheckpointFacts, Hold | None]:
    """`read_facts`, and what keeps a run in ``path`` from removing the checkpoint.

    When a run removes it between the two, its tracker points to a newer one.
    """
    while True:
        tracked = _tracked(path)
        try:
            facts = read_facts(path)
            held = hold(facts.directory)
            if held is not None:
                return facts, held
            raise CheckpointError(f"{facts.directory}: is just being removed; open a newer one")
        except CheckpointError:
            if _tracked(path) == tracked:
                raise


def _tracked(path: Path) -> bytes | None:
    try:
        return (path / TRACKER).read_bytes()
    except OSError:
        return None


def _check_described(directory: Path, config: ModelConfig) -> None:
    """Refuse a checkpoint of ours that is not what its manifest says, by names, sizes and shape.

    Other heads over the same tensors (12 of 4 channels for 6 of 8) only show here. Hashes are left
    to `verify`: they cost a read of every byte.
    """
    try:
        described, _ = read_manifest(directory)
    except DamagedError:  # none, or somebody else's; `verify` insists on one it can read
        return
    if not str(described.get("writer")).startswith(WRITER):
        return
    differences = check_manifest(directory, hashes=False)
    for name, found in (("shape", config.shape.as_dict()), ("tied", config.tied)):
        if described.get(name, found) != found:
            differences.append(f"its configuration says {name} {found}, not {described[name]}")
    if differences:
        raise DamagedError(
            f"{directory}: not what its {MANIFEST} describes: {differences[0]}; copy it again (or "
            f"remove {MANIFEST}, if the change was meant)"
        )


def companion_files(directory: Path) -> dict[str, Path]:
    """Files that travel with a model: everything at the top that is not weights or ours."""
    return {
        path.name: path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_NOT_COMPANIONS)
        and path.name not in (CONFIG, PLAN, REPAIR, MANIFEST)
    }


def _plan_in(directory: Path) -> Path | None:
    return directory / PLAN if (directory / PLAN).is_file() else None


def _open_hf(directory: Path) -> Source:
    return hf.HuggingFaceSource(
        directory,
        *read_config_as(directory / CONFIG),
        companion_files=companion_files(directory),
        plan_path=_plan_in(directory),
    )


def _megatron_config(
    facts: CheckpointFacts, common: Any, where: Path, family: str | None
) -> tuple[ModelConfig, dict[str, Path]]:
    companions = facts.directory / COMPANIONS
    if (companions / CONFIG).is_file():
        return read_config(companions / CONFIG), companion_files(companions)
    warn_unverified(facts.directory)
    args = common.get("args") if isinstance(common, dict) else None
    return config_from_args(args, where, family), {}


def _open_dist(facts: CheckpointFacts, family: str | None) -> Source:
    directory = facts.directory
    path, advice = directory / mcore_dist.FORMAT, "; copy it again"
    backend = read_table(path, DamagedError, advice=advice).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{directory}: sharded backend {backend!r}; wanted torch_dist")
    common_path = directory / mcore_dist.COMMON
    common = load_untrusted(common_path, mmap=False)
    index = mcore_dist.read_index(directory)
    config, companions = _megatron_config(facts, common, common_path, family)
    lora = read_lora(common, common_path, config)
    kind = mcore_dist.DistSource if lora is None else partial(LoraSource, lora=lora)
    return kind(
        directory,
        config,
        _grid_of(common),
        index,
        companion_files=companions,
        plan_path=_plan_in(directory),
        iteration=facts.iteration,
    )


def _grid_of(common: Any) -> ParallelGrid:
    """The layout that a checkpoint's arguments name; 1 x 1 where they do not say."""
    args = common.get("args") if isinstance(common, dict) else None
    values = vars(args) if isinstance(args, Namespace) else {}

    def size(name: str) -> int | None:
        value = values.get(name)
        return value if type(value) is int and value > 0 else None

    return ParallelGrid(
        tensor_parallel=size("tensor_model_parallel_size") or 1,
        pipeline_parallel=size("pipeline_model_parallel_size") or 1,
        first_stage_layers=size("decoder_first_pipeline_num_layers"),
        last_stage_layers=size("decoder_last_pipeline_num_layers"),
    )


def _open_legacy(facts: CheckpointFacts, family: str | None) -> Source:
    directory = facts.directory
    grid = mcore_legacy.find_grid(directory)
    first = directory / mcore_legacy.rank_directory(0, 0, grid.pipeline_parallel)
    common = load_untrusted(first / mcore_legacy.FILE, mmap=True)
    if (told := _grid_of(common)).world_size > grid.world_size:
        mcore_legacy.check_ranks(directory, told.tensor_parallel, told.pipeline_parallel)
    config, companions = _megatron_config(facts, common, first / mcore_legacy.FILE, family)
    return mcore_legacy.LegacySource(
        directory,
        config,
        grid,
        companion_files=companions,
        plan_path=_plan_in(directory),
        iteration=facts.iteration,
    )
