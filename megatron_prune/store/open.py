"""What lies at a path: Hugging Face, torch_dist or legacy; and its `Source`.

A Megatron root holds ``latest_checkpointed_iteration.txt`` and iteration directories. Ours keep the
model's companions (config, tokenizer) in ``hf/`` and its plan in ``plan.json`` inside the iteration
directory, so that one directory is one whole checkpoint. Stock checkpoints have neither and are
read by their arguments.
"""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_prune.data.tokenizers import TRACKER
from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.families import read_config, read_config_as
from megatron_prune.families.config import CONFIG, told_dtype
from megatron_prune.files import Hold, hold
from megatron_prune.files.parsing import read_table
from megatron_prune.model.axes import names
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.shape import ModelConfig
from megatron_prune.model.tensors import DTYPE_WORDS
from megatron_prune.sources.source import Source
from megatron_prune.store import hf, mcore_dist, mcore_legacy
from megatron_prune.store.bridge import RUN_CONFIG, TOKENIZER, read_arguments
from megatron_prune.store.commit import MANIFEST, check_manifest, read_manifest
from megatron_prune.store.companions import find_companions, find_plan
from megatron_prune.store.lora import LoraSource, read_lora
from megatron_prune.store.megatron_args import config_from_args, warn_unverified
from megatron_prune.store.passenger import COMPANIONS
from megatron_prune.store.recognise import ADAPTER, foreign_directory, no_directory
from megatron_prune.store.untrusted import load_untrusted


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
        raise CheckpointError(f"{path}: {no_directory(path)}")
    directory = iteration_directory(path)
    match = re.fullmatch(r"iter_(\d+)", directory.name)
    iteration = int(match[1]) if match else 0
    model = hf.has_weights(directory)
    if any((directory / name).is_file() for name in (mcore_dist.INDEX, mcore_dist.COMMON)):
        if not (directory / CONFIG).is_file():
            return CheckpointFacts(directory=directory, format="torch_dist", iteration=iteration)
        if not model:
            raise CheckpointError(
                f"{path}: transformers' distributed checkpoint, which is not read; load it there "
                "and save_pretrained(distributed_checkpoint=False)"
            )
    if any(directory.glob(f"mp_rank_*/{mcore_legacy.FILE}")):
        return CheckpointFacts(directory=directory, format="torch", iteration=iteration)
    has_config = (directory / CONFIG).is_file()
    if has_config and model:
        return CheckpointFacts(directory=directory, format="hf")
    if what := foreign_directory(directory):
        raise CheckpointError(f"{path}: {what}")
    if has_config:
        raise CheckpointError(
            f"{path}: no {hf.SINGLE}, {hf.INDEX} or {hf.BIN_SINGLE} beside its {CONFIG}; "
            "no weights to read"
        )
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
    if told_dtype(source.config.hf_config) is None:
        _tell_dtype(source)
    _check_described(facts.directory, source.config)
    return source


def _tell_dtype(source: Source) -> None:
    """For a model whose configuration says no dtype: that of its weights, which the next one has
    to say. Where they are of several, which of them is said."""
    first = str(source.first_dtype).removeprefix("torch.")
    found = {str(source.dtype(name)).removeprefix("torch.") for name in names(source.config)}
    if len(found) > 1:
        warnings.warn(
            f"{source.path}: weights are {' and '.join(sorted(found))}, and no dtype is said; what "
            f"is written says {first}, that of the first of them, as transformers would load it",
            stacklevel=2,
        )
    values = source.config.hf_config
    said = {**values, "dtype": first} if values else values
    dtype = DTYPE_WORDS.get(first, "fp32")
    source.config = replace(source.config, dtype=dtype, hf_config=said)


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
    differences = check_manifest(directory, hashes=False)
    for name, found in (("shape", config.shape.as_dict()), ("tied", config.tied)):
        if described.get(name, found) != found:
            differences.append(f"its configuration says {name} {found}, not {described[name]}")
    if differences:
        raise DamagedError(
            f"{directory}: not what its {MANIFEST} describes: {differences[0]}; copy it again (or "
            f"remove {MANIFEST}, if the change was meant)"
        )


def _open_hf(directory: Path) -> Source:
    if (directory / ADAPTER).is_file():
        raise CheckpointError(
            f"{directory}: a model and a PEFT adapter beside it ({ADAPTER}); transformers loads "
            "both, this reads the model alone. Merge them first (peft: merge_and_unload(), then "
            "save_pretrained), or move the adapter's files away"
        )
    weights = hf.find_weights(directory)
    found = find_companions(directory, directory, hf.files_of(weights))
    source = hf.HuggingFaceSource(
        directory,
        *read_config_as(directory / CONFIG),
        weights=weights,
        companion_files=found.files,
        plan_path=found.plan,
    )
    if found.left:
        warnings.warn(
            f"{directory}: read from {', '.join(sorted(hf.files_of(weights))[:2])}; left out, as "
            f"transformers does: {', '.join(found.left)}",
            stacklevel=2,
        )
    return source


def _megatron_config(
    facts: CheckpointFacts, common: Any, where: Path, family: str | None
) -> tuple[ModelConfig, dict[str, Path]]:
    companions = facts.directory / COMPANIONS
    if (companions / CONFIG).is_file():
        found = find_companions(companions, facts.directory)
        return read_config(companions / CONFIG), found.files
    warn_unverified(facts.directory)
    args = common.get("args") if isinstance(common, dict) else None
    beside = facts.directory / TOKENIZER  # where Megatron-Bridge puts it
    carried = find_companions(beside, facts.directory).files if beside.is_dir() else {}
    try:
        return config_from_args(args, where, family), carried
    except (TypeError, ValueError, OverflowError) as error:  # numbers that are none
        kind = type(error).__name__
        raise CheckpointError(f"{where}: its arguments: {kind}: {error}") from None


def _open_dist(facts: CheckpointFacts, family: str | None) -> Source:
    directory = facts.directory
    _check_index_kind(directory)
    path = directory / mcore_dist.FORMAT
    found = read_table(path, DamagedError, advice="; copy it again")
    if "sharded_backend" not in found:
        raise CheckpointError(
            f"{path}: has no sharded_backend; wanted Megatron's, which names the format"
        )
    backend = found["sharded_backend"]
    if backend != "torch_dist":
        raise CheckpointError(
            f"{directory}: sharded backend {backend!r}; wanted torch_dist. Load it with the "
            "Megatron-LM that wrote it and save it with --ckpt-format torch_dist"
        )
    common_path, run = directory / mcore_dist.COMMON, directory / RUN_CONFIG
    common = load_untrusted(common_path, mmap=False)
    if isinstance(common, dict) and "args" not in common and run.is_file():
        common_path, common = run, {**common, "args": read_arguments(run)}
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
        plan_path=find_plan(directory),
        iteration=facts.iteration,
    )


def _check_index_kind(directory: Path) -> None:
    """Refuse a directory of torch.distributed.checkpoint that is no torch_dist.

    Raises:
        DamagedError: it is, by its manifest, and has lost the file that says so.
        CheckpointError: it is of another format.
    """
    if (directory / mcore_dist.FORMAT).is_file():
        return
    try:
        listed = mcore_dist.FORMAT in read_manifest(directory)[1]
    except DamagedError:
        listed = False
    if listed:
        raise DamagedError(
            f"{directory}: {mcore_dist.FORMAT} is missing, which its {MANIFEST} lists; fetch that "
            "file from where the checkpoint came from"
        )
    raise CheckpointError(
        f"{directory}: a torch.distributed.checkpoint directory without {mcore_dist.FORMAT}: "
        "Megatron's torch_dcp or fsdp_dtensor, FSDP, torchtitan or the like; this reads "
        "torch_dist. Load it with what wrote it and save it with --ckpt-format torch_dist, or for "
        "Hugging Face"
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
        plan_path=find_plan(directory),
        iteration=facts.iteration,
    )
