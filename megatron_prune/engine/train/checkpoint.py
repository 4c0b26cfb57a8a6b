"""Checkpoints of a training run: where to start, what to save, what to keep.

``SAVE/iter_0000123`` is one whole checkpoint: torch_dist weights and optimizer state that any
layout can load, ``hf/`` with the model's config and tokenizer, ``plan.json``, ``manifest.json``. It
is written beside under a temporary name, flushed and renamed; the tracker is replaced last. The
newest complete one can always be found again.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prune.data.tokenizers import TRACKER
from megatron_prune.engine.failures import is_lost_rank, together
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.train.dist_reader import load_sharded
from megatron_prune.engine.train.dist_writer import ShardedWrite
from megatron_prune.engine.train.options import TrainOptions
from megatron_prune.errors import ConfigError, DamagedError, StorageError
from megatron_prune.files import replace_file, try_lock
from megatron_prune.ranks import Ranks
from megatron_prune.store.commit import (
    atomic_directory,
    check_manifest,
    sweep_beside,
    write_manifest,
)
from megatron_prune.store.lora import LORA, lora_record
from megatron_prune.store.mcore_dist import COMMON
from megatron_prune.store.megatron_args import megatron_args
from megatron_prune.store.open import read_facts
from megatron_prune.store.passenger import Passenger
from megatron_prune.store.training import STATE, state_in
from megatron_prune.store.untrusted import load_untrusted

_WRONG_STATE = (  # what megatron-core and our own code meet in values that are none of a run's
    ArithmeticError,
    AssertionError,
    AttributeError,
    CheckpointingException,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
_NUMBER = re.compile("[0-9]{1,18}")
_OURS = re.compile(
    r"(metrics|commands)\.jsonl|plan\.json|mask_scores\.safetensors|tensorboard|\.cache|\.lock"
    r"|\.iter_\d+\.(tmp|old)\..*"
    r"|\.metrics\..*"
)


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a run begins.

    Attributes:
        directory: the checkpoint to open.
        state: what the run it belongs to had reached; None at the beginning.
    """

    directory: Path
    state: Mapping[str, Any] | None

    @property
    def iteration(self) -> int:
        return int(self.state["iteration"]) if self.state else 0


def iteration_path(save: Path, iteration: int) -> Path:
    return save / f"iter_{iteration:07d}"


def is_complete(directory: Path) -> bool:
    """Whether every file of the manifest is there with its size. Reads no weights."""
    try:
        return not check_manifest(directory, hashes=False)
    except DamagedError:
        return False


def _iterations(save: Path) -> dict[int, Path]:
    """The checkpoints in ``save``, whole or not, by iteration."""
    paths = (path for path in save.glob("iter_*") if path.is_dir())
    return {int(p.name[5:]): p for p in paths if _NUMBER.fullmatch(p.name[5:])}


def newest_checkpoint(save: Path, *, mend: bool = True) -> Path | None:
    """The checkpoint a run in ``save`` continues from.

    The tracker's, if it points to a complete one; else the newest complete one, with a warning.

    Args:
        mend: clear away what killed saves left, and put the tracker right.

    Raises:
        DamagedError: the tracker says there is one, and none is complete.
    """
    if mend:
        sweep(save)
    found = _iterations(save)
    tracker = save / TRACKER
    word = tracker.read_text(errors="replace").strip() if tracker.is_file() else None
    pointed = found.get(int(word)) if word and _NUMBER.fullmatch(word) else None
    if pointed is not None and is_complete(pointed):
        return pointed
    newest = next((found[n] for n in sorted(found, reverse=True) if is_complete(found[n])), None)
    if newest is None and word is not None:
        raise DamagedError(
            f"{tracker}: {word[:40]!r}, and no complete checkpoint in {save}; restore one, or "
            "train into another directory"
        )
    if newest is not None:
        print(
            f"{tracker}: {'missing' if word is None else repr(word[:40])}; continuing from the "
            f"newest complete checkpoint, {newest.name}",
            file=sys.stderr,
        )
        if mend:
            replace_file(tracker, f"{int(newest.name[5:])}".encode())
    return newest


def training_state(directory: Path) -> Mapping[str, Any] | None:
    """What a training run left in a checkpoint, None in a checkpoint that is a model only."""
    if not (directory / COMMON).is_file():
        return None
    return state_in(load_untrusted(directory / COMMON, mmap=False), directory / COMMON)


def find_start(options: TrainOptions, *, mend: bool = True) -> Start:
    """Continue what lies in ``--save``, else what lies in ``--load``, else begin with its weights.

    Args:
        mend: see `newest_checkpoint`; False for a dry run, which writes nothing.

    Raises:
        ConfigError: ``--save`` holds something that training did not write.
        CheckpointError: there is nothing to load.
    """
    save, load = options.save, options.load
    assert load is not None  # check_options
    if save.exists() and not save.is_dir():
        raise ConfigError(f"--save {save} is a file; wanted a directory")
    newest = newest_checkpoint(save, mend=mend)
    if newest is not None:
        state = training_state(newest)
        if state is None:
            raise ConfigError(
                f"--save {save}: {newest.name} is a model without training state, which training "
                "did not write; choose another directory to save in"
            )
        return Start(directory=newest, state=state)
    foreign = (
        [p.name for p in save.iterdir() if not _OURS.fullmatch(p.name)] if save.exists() else []
    )
    if foreign:
        raise ConfigError(
            f"--save {save} is not empty and no training run ({', '.join(sorted(foreign)[:3])}); "
            "choose a directory that does not exist yet"
        )
    facts = read_facts(load)
    fresh = options.init_random or options.finetune or facts.format != "torch_dist"
    return Start(
        directory=facts.directory, state=None if fresh else training_state(facts.directory)
    )


def sweep(save: Path) -> None:
    """Clear away what killed saves left, and put back a checkpoint that one had set aside."""
    for name in {path.name.split(".")[1] for path in save.glob(".iter_*.*.*")}:
        sweep_beside(save / name)


def _metadata() -> dict[str, Any]:
    # the default sharding cannot be saved in 0.16.1; this one loads at any TP, PP and DP
    return {"distrib_optim_sharding_type": "fully_reshardable"}


def saving(
    options: TrainOptions,
    groups: Groups,
    passenger: Passenger,
    *,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    state: Mapping[str, Any],
    overlaps: bool,
) -> Iterator[ShardedWrite]:
    """Write the checkpoint of ``state['iteration']``, point to it, drop the oldest.

    A generator, so that training can go on in the middle: it yields once, the state copied and
    being written when ``overlaps``; the next step waits for the files and publishes them. All ranks
    take each step together. Closed in between, it leaves nothing behind.

    Raises:
        StorageError: the disk is full or cannot be written; those before stay as they were.
        DistributedError: another rank failed.
    """
    iteration = state["iteration"]
    target = iteration_path(options.save, iteration)
    weights = model.sharded_state_dict(metadata=None)
    arguments = megatron_args(
        passenger.config,
        groups.grid,
        iteration=iteration,
        consumed_train_samples=state["consumed_samples"],
        seq_length=options.seq_length,
        micro_batch_size=options.micro_batch_size,
        global_batch_size=options.batch_size(groups.data_parallel),
        use_distributed_optimizer=options.use_distributed_optimizer,
        ckpt_format="torch_dist",
        prune_plan_digest=passenger.plan_digest,
    )
    whole = {
        "args": arguments,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "model": weights,
        "optimizer": optimizer.sharded_state_dict(weights, metadata=_metadata()),
        "opt_param_scheduler": scheduler.state_dict(),
        "num_floating_point_operations_so_far": 0,
        STATE: dict(state),
        **({} if options.lora is None else {LORA: lora_record(options.lora)}),
    }
    try:
        with (
            atomic_directory(target, ranks=groups.ranks, overwrite=True) as directory,
            closing(ShardedWrite(whole, directory, groups, overlaps=overlaps)) as write,
        ):
            yield write
            records = write.finish()
            if groups.ranks.is_first:
                passenger.write(directory, "torch_dist")
                facts = passenger.facts("torch_dist", groups.grid)
                write_manifest(directory, {**facts, "iteration": iteration}, records)
    except (CheckpointException, RuntimeError) as error:  # the first is a BaseException
        if is_lost_rank(error):
            raise
        raise StorageError(f"{target}: not saved: {error}") from error
    together(groups.ranks, lambda: _publish(options, groups.ranks, iteration))


def _publish(options: TrainOptions, ranks: Ranks, iteration: int) -> None:
    """Point to the new checkpoint, then forget the oldest: never the one pointed to.

    One that is being read, here or elsewhere, is left to the next save.
    """
    if not ranks.is_first:
        return
    replace_file(options.save / TRACKER, str(iteration).encode())
    if options.keep_last is None:
        return
    kept = [path for _, path in sorted(_iterations(options.save).items())]
    for old in kept[: -options.keep_last]:
        if old == iteration_path(options.save, iteration) or (lock := try_lock(old)) is None:
            continue
        doomed = old.with_name(f".{old.name}.tmp.dropped")  # no half-deleted checkpoint by its name
        old.rename(doomed)
        shutil.rmtree(doomed)
        os.close(lock)


@contextmanager
def taking_up(start: Start) -> Iterator[None]:
    """Around all that takes up a saved state: what is none, whatever it makes fail, is refused.

    Raises:
        DamagedError: naming the checkpoint.
    """
    try:
        yield
    except _WRONG_STATE as error:
        if start.state is None or is_lost_rank(error):
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise DamagedError(
            f"{start.directory}: its training state cannot be taken up: {type(error).__name__}: "
            f"{first[:200]}; take its weights into a new run with --finetune"
        ) from error


def load_checkpoint(
    start: Start,
    options: TrainOptions,
    groups: Groups,
    *,
    model: Any,
    optimizer: Any | None,
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Load the weights of a training checkpoint, from whatever layout it was written at.

    Returns:
        The optimizer's state, None when ``optimizer`` is None; and the schedule's.

    Raises:
        ConfigError: its optimizer state is of another kind than the flags ask for.
        DamagedError: it cannot be read, see `load_sharded`.
    """
    state = start.state
    assert state is not None
    if optimizer is not None:
        _check_same_optimizer(start.directory, state, options)
    weights = model.sharded_state_dict(metadata=None)
    wanted: dict[str, Any] = {"model": weights}
    if optimizer is not None:
        wanted["optimizer"] = optimizer.sharded_state_dict(
            weights, is_loading=True, metadata=_metadata()
        )
    loaded = load_sharded(wanted, start.directory, groups.ranks)
    model.load_state_dict(loaded["model"])
    return loaded.get("optimizer") if optimizer is not None else None, loaded["opt_param_scheduler"]


def _check_same_optimizer(directory: Path, state: Mapping[str, Any], options: TrainOptions) -> None:
    found = (state["dtype"], state["use_distributed_optimizer"])
    if found == (options.dtype, options.use_distributed_optimizer):
        return

    def flags(dtype: str, distributed: bool) -> str:
        word = "fp32" if dtype == "fp32" else f"--{dtype}"
        return f"{word} {'with' if distributed else 'without'} --use-distributed-optimizer"

    raise ConfigError(
        f"{directory}: its optimizer state is that of {flags(*found)}, the flags are "
        f"{flags(options.dtype, options.use_distributed_optimizer)}; give the same flags, or "
        "--no-load-optim to continue with its weights and a new optimizer"
    )
