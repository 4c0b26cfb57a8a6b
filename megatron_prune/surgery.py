"""Surgery: for each tensor of the target, read the slice it needs, take, shard, write.

`PrunedSource` is a model seen through a plan; `write_checkpoint` streams any source into any format
and layout. Convert, prune and reshard are calls of these two. One step holds a block of rows or one
tensor, never the model. Under torchrun the ranks take the target's files in turn.

Pruning here is pure slicing. What repairs it (`replaced.RepairedSource`: norms rescaled for the
smaller denominator of RMSNorm, projections fitted anew) is a source around a `PrunedSource`, and so
are gates that were learned with it (`folded.FoldedSource`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_prune.data.tokenizers import TRACKER
from megatron_prune.errors import DamagedError, PlanError, StorageError
from megatron_prune.files import write_file
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.planning.plan import PrunePlan, load_plan
from megatron_prune.ranks import Ranks
from megatron_prune.sources.folding_record import Folding, load_folding
from megatron_prune.sources.repair_record import Repair
from megatron_prune.sources.source import CARD, COMMANDS, Source
from megatron_prune.sources.sparsity_record import Sparsity, load_sparsity
from megatron_prune.store.commit import atomic_directory, write_manifest
from megatron_prune.store.hf import DEFAULT_SHARD_BYTES, HuggingFaceWriter
from megatron_prune.store.mcore_dist import DistWriter
from megatron_prune.store.mcore_legacy import LegacyWriter
from megatron_prune.store.megatron import ITERATION
from megatron_prune.store.megatron_args import check_expressible, megatron_args
from megatron_prune.store.model_card import CardFacts, base_model_of, model_card
from megatron_prune.store.passenger import Passenger, commands_of
from megatron_prune.store.training import SavedRun
from megatron_prune.store.writer import Progress, Writer


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where and as what a checkpoint is written.

    Attributes:
        format: hf, torch_dist or torch.
        te_norms: legacy format only: name norms as Transformer Engine's layer spec does.
        base_model: hub name that the model card gives as the model's origin; None for what the
            source says.
        run: torch_dist only: the training run that goes on from it; None for a model alone.
    """

    directory: Path
    format: str
    grid: ParallelGrid = field(default_factory=ParallelGrid)
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    te_norms: bool = True
    base_model: str | None = None
    run: SavedRun | None = None

    @property
    def iteration(self) -> int:
        return ITERATION if self.run is None else self.run.iteration

    @property
    def weights_directory(self) -> str:
        """Of the weights, below the directory."""
        return "." if self.format == "hf" else f"iter_{self.iteration:07d}"


def make_writer(source: Source, target: Target, plan_digest: str | None = None) -> Writer:
    """The writer of a target, with everything about it checked.

    Raises:
        ShapeError: the layout does not divide the model.
        CheckpointError: the format cannot express the model.
    """
    if target.format == "hf":
        return HuggingFaceWriter(source, target.max_shard_bytes)
    check_expressible(source.config)
    target.grid.check(source.config.shape)
    args = megatron_args(
        source.config,
        target.grid,
        iteration=target.iteration,
        ckpt_format=target.format,
        transformer_impl="transformer_engine" if target.te_norms else "local",
        prune_plan_digest=plan_digest,
        **({} if target.run is None else target.run.arguments),
    )
    if target.format == "torch":
        return LegacyWriter(source, target.grid, args, te_norms=target.te_norms)
    return DistWriter(source, target.grid, args, target.run)


def write_checkpoint(
    source: Source,
    target: Target,
    *,
    ranks: Ranks,
    plan: PrunePlan | None = None,
    repair: Repair | None = None,
    folding: Folding | None = None,
    overwrite: bool = False,
    progress: Callable[[int], Progress] = lambda total: lambda done: None,
) -> None:
    """Write ``source`` as ``target`` says, whole or not at all.

    Costs one read of the needed bytes and one write; private memory of a few row blocks.

    Args:
        plan: the plan that ``source`` was pruned with just now; without one, the source's own plan
            file travels along.
        repair: the record of what else than slicing was done to it.
        folding: the record of the gates that were folded into it.
        progress: given the bytes this rank will write, returns what is told of each part written.

    Raises:
        PruneError: ranks have different plans or models; nothing was written.
    """
    base_model = target.base_model or base_model_of(source)
    passenger = _passenger(source, base_model, plan, repair, folding)
    ranks.agree("the plan", str(passenger.plan_digest))
    ranks.agree_on(f"the model in {source.path}", lambda: source.digest)
    writer = make_writer(source, target, passenger.plan_digest)
    with (
        atomic_directory(target.directory, ranks=ranks, overwrite=overwrite) as temporary,
        ThreadPoolExecutor(max_workers=4) as pool,  # reading ahead, hashing, flushing
    ):
        directory = temporary / target.weights_directory
        mine = writer.files[ranks.rank :: ranks.world_size]
        written, error = {}, None
        try:
            check_space(temporary, writer.total_bytes)
            directory.mkdir(parents=True, exist_ok=True)
            tell = progress(writer.total_bytes * len(mine) // len(writer.files))
            written = writer.write_files(directory, mine, pool, tell)
        except Exception as caught:  # handed to every rank by fail_together
            error = caught
        ranks.fail_together(error)
        everything = {k: v for part in ranks.gather(written) for k, v in part.items()}
        if ranks.is_first:
            writer.finish(directory, everything)
            passenger.write(directory, target.format)
            facts = passenger.facts(target.format, target.grid)
            write_manifest(directory, facts, {file: w.record for file, w in everything.items()})
            if target.format != "hf":
                write_file(directory.parent / TRACKER, f"{target.iteration}\n".encode())


def _passenger(
    source: Source,
    base_model: str | None,
    plan: PrunePlan | None,
    repair: Repair | None,
    folding: Folding | None,
) -> Passenger:
    """What travels with the model, in any format: among it a new model card, so that the way to an
    export makes no difference to it."""
    passenger = Passenger.of(
        source,
        None if plan is None else plan.to_json().encode(),
        None if repair is None else repair.to_json().encode(),
        None if folding is None else folding.to_json().encode(),
    )
    files, commands = dict(passenger.files), commands_of(source)
    if commands:
        files[COMMANDS] = "".join(line + "\n" for line in commands).encode()
    described = _carried_plan(source) if plan is None else plan
    if plan is None and described is not None:
        folding = _carried_folding(source, described)
    files[CARD] = model_card(
        CardFacts(
            config=source.config,
            plan=described,
            plan_digest=passenger.plan_digest,
            is_repaired=described is not None and passenger.repair is not None,
            folding=folding,
            sparsity=_carried_sparsity(source),
            commands=commands,
            source_card=files.get(CARD),
            base_model=base_model,
        )
    )
    return replace(passenger, files=files)


def _carried_plan(source: Source) -> PrunePlan | None:
    """The plan beside a source, where it is one and of this model."""
    try:
        plan = None if source.plan_path is None else load_plan(source.plan_path)
    except PlanError:  # carried along as it is; `verify` reads it
        return None
    return plan if plan is not None and plan.target == source.config.shape else None


def _carried_folding(source: Source, plan: PrunePlan) -> Folding | None:
    """The record beside the plan of a source, likewise."""
    try:
        path = source.folding_path
        return None if path is None else load_folding(path, plan, source.config)
    except DamagedError:
        return None


def _carried_sparsity(source: Source) -> Sparsity | None:
    """The record beside a source, where it is one; of a damaged one `inspect` and `verify` tell."""
    try:
        return None if source.sparsity_path is None else load_sparsity(source.sparsity_path)
    except DamagedError:
        return None


def check_space(directory: Path, wanted: int) -> None:
    """Refuse to write more bytes into a temporary directory than its disk has room for.

    Raises:
        StorageError: it has not.
    """
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise StorageError(
            f"{directory.parent}: {free / 1e9:.1f} GB free, {wanted / 1e9:.1f} GB wanted; "
            "make room or choose another place"
        )
