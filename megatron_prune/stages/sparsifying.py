"""Set weights of the layers' linears to zero, in one shot: magnitude, Wanda, SparseGPT and after.

  megatron-prune sparsify --load llama --save llama-2of4 --to hf --pattern 2:4 --data calib.jsonl
  torchrun --nproc-per-node 8 -m megatron_prune sparsify --load llama-tp8 --save llama-sparse \\
      --to megatron --tensor-model-parallel-size 8 --method wanda --sparsity 0.5 --data calib.jsonl

Layer by layer: the text goes through the layers that are pruned already, what enters a linear of
the next layer says which of its weights matter, and some methods change the others to make good
for those that go. The result is the same at every layout. sparsity.json beside the weights says
what was done; `verify --source` holds the model to it, `train --keep-zeros` keeps the zeros.
A sparse model is as large on disk as a dense one, and as fast without kernels made for it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import prod
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_prune import __version__
from megatron_prune.engine.running import CALIBRATION
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.files import write_file
from megatron_prune.flags import flag
from megatron_prune.model.axes import names, split_layer, tensor_shape
from megatron_prune.model.lazy import Tensor
from megatron_prune.ranks import Ranks
from megatron_prune.sources.source import SPARSITY, Source
from megatron_prune.sources.sparse import SparseSource
from megatron_prune.sources.sparsity_record import Sparsity
from megatron_prune.sparsity.allocation import by_outliers
from megatron_prune.sparsity.method import Asked, How
from megatron_prune.stages.common import agree_on_start, check_save, opened
from megatron_prune.stages.console import SILENT, Console
from megatron_prune.stages.reading import read_through
from megatron_prune.stages.sparse_flags import Decided, SparsityFlags, decide
from megatron_prune.stages.targeting import Targeted
from megatron_prune.stages.writing import Written, tell_dropped, write
from megatron_prune.store.commit import scratch_directory
from megatron_prune.surgery import check_space, make_writer

if TYPE_CHECKING:
    from megatron_prune.engine.forward.model import ModelOptions
    from megatron_prune.engine.groups import Groups
    from megatron_prune.engine.sparsify import Calibration, Sparsified
    from megatron_prune.sources.replaced import Tensors

_TOLERANCE = 1e-3  # by how much a matrix may have more zeros than are asked for
_UNEVEN = 0.05  # the same under a pattern, of zeros that do not lie in its groups
_MOST = 1e15  # what a weight may be: its square times that of an input has to fit float32
_FAR = 0.02  # between zeros asked for and reached, of which a message tells
_TOLD = 4  # matrices that a message names


@dataclass(frozen=True, kw_only=True)
class SparsifyOptions(SparsityFlags, Targeted):
    calibration_sampling: str = flag(
        "windows: the first of CALIB, one behind the other; documents: drawn as the official codes "
        "of SparseGPT and Wanda do",
        default="windows",
        choices=("windows", "documents"),
        group=CALIBRATION,
    )
    seed: int = flag("of --calibration-sampling documents", default=0, group=CALIBRATION)
    allow_nonfinite: bool = False  # no statistic would be a number
    can_allow_nonfinite: ClassVar[bool] = False

    def check_sparsity(self) -> None:
        """And what says how text is drawn."""
        super().check_sparsity()
        if self.calibration_sampling == "windows" and self.seed:
            raise ConfigError(
                f"--seed {self.seed}: windows are the first of CALIB; it draws those of "
                "--calibration-sampling documents, leave it out"
            )

    def windows(self, source: Source, seq_length: int, console: Console) -> Tensor:
        """[W, S] int64 token ids of ``--data``."""
        if self.calibration_sampling == "windows":
            return super().windows(source, seq_length, console)
        from megatron_prune.data.windows import document_windows

        assert self.data is not None
        return document_windows(
            self.data,
            self.tokenizer_model or self.load,
            seq_length=seq_length,
            count=self.num_samples,
            seed=self.seed,
            vocab_size=source.config.shape.vocab_size,
        )


def sparsify(options: SparsifyOptions, console: Console = SILENT) -> Written:
    """Write the model with zeros; see `write`.

    Raises:
        ConfigError: options that do not go together, or do not fit the model.
        DamagedError: weights, or statistics of the text, that are not finite.
    """
    options.check_sparsity()
    options.check_files()
    target = options.target
    check_save(options.save, options.load, overwrite=options.overwrite)
    options.check_publishing(options.to)
    with opened(options.load, options.family) as source:
        source.config.shape.check_uniform("sparsify", "make it sparse before it is pruned")
        decided = decide(options, source.config)
        tell_dropped(source, console)
        writer = make_writer(options.cast(source), target)  # refuses what cannot be written
        if options.dry_run:
            console.show(decided.table())
            return options.publish(
                write("sparsify", options, options.cast(source), target, console), console
            )
        with _sparse(options, source, decided, writer.total_bytes, console) as (sparse, ranks):
            written = write("sparsify", options, options.cast(sparse), target, console, ranks=ranks)
    return options.publish(written, console)


@contextmanager
def _sparse(
    options: SparsifyOptions, source: Source, decided: Decided, written: int, console: Console
) -> Iterator[tuple[Source, Ranks]]:
    """The model with its zeros; process groups and scratch files live for the block.

    Args:
        written: bytes that the caller will write; with those of the scratch files they have to fit.
    """
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.sources.replaced import Tensors

    model, grid = options.calibration_run(source)
    with model_parallel(grid, timeout_minutes=options.distributed_timeout_minutes) as groups:
        agree_on_start(groups.ranks, options, source)
        calibration = None
        if options.needs_text:
            calibration = _calibration(options, source, model, groups, console)
        zeros = _look(options, source, groups, console)
        _check_room(source, decided.targets, decided.asked, zeros)
        with scratch_directory(options.save, ranks=groups.ranks) as scratch:
            sizes = (
                prod(tensor_shape(name, source.config.shape)) * source.dtype(name).itemsize
                for name in decided.targets
            )
            on_first_rank(groups.ranks, lambda: check_space(scratch, written + sum(sizes)))
            tensors = Tensors(scratch)
            record = _run(options, source, decided, zeros, calibration, groups, tensors, console)
            path = scratch / SPARSITY
            if groups.ranks.is_first:
                write_file(path, record.to_json().encode())
            groups.ranks.barrier()
            yield SparseSource(source, tensors, path), groups.ranks


def _look(
    options: SparsifyOptions, source: Source, groups: Groups, console: Console
) -> Mapping[str, int]:
    """Read every weight once, shared among the ranks, before hours of work: its zeros by name.

    Raises:
        DamagedError: some are not finite, in the source or in ``--dtype``, or too large to square.
    """
    from megatron_prune.engine.failures import together

    ranks, zeros = groups.ranks, dict[str, int]()

    def see(name: str, x: Tensor) -> None:
        zeros[name] = zeros.get(name, 0) + x.numel() - int(x.count_nonzero())
        if options.needs_text and len(x) and (most := float(x.abs().max())) > _MOST:
            raise DamagedError(
                f"{source.path}: {source.stored_name(name)}: a weight of {most:.3g}, more than "
                f"{_MOST:.0g}; no statistic of it fits float32, use another copy of the model"
            )

    mine = [*names(source.config)][ranks.rank :: ranks.world_size]
    checked = options.checked(options.cast(source))
    together(ranks, lambda: read_through(checked, mine, console, see))
    return {name: n for part in ranks.gather(zeros) for name, n in part.items()}


def _check_room(
    source: Source,
    targets: Collection[str],
    asked: Sequence[Asked] | None,
    zeros: Mapping[str, int],
) -> None:
    """Refuse matrices that have more zeros already than are asked for, where that is known.

    Raises:
        ConfigError: one has; names it.
    """
    for name in targets if asked is not None else ():
        layer = split_layer(name)[0]
        assert layer is not None and asked is not None
        share, most = (
            zeros[name] / prod(tensor_shape(name, source.config.shape)),
            asked[layer].share,
        )
        more = _TOLERANCE if asked[layer].pattern is None else _UNEVEN
        if share > most + more:
            raise ConfigError(
                f"{source.path}: {source.stored_name(name)} has {share:.2%} zeros already, more "
                f"than the {most:.2%} that are asked for; ask for more, or leave it out with "
                "--ignore"
            )


def _calibration(
    options: SparsifyOptions, source: Source, model: ModelOptions, groups: Groups, console: Console
) -> Calibration:
    from megatron_prune.engine.failures import on_first_rank
    from megatron_prune.engine.sparsify import Calibration

    windows = on_first_rank(
        groups.ranks, lambda: options.windows(source, model.seq_length, console)
    )
    return Calibration(windows_WS=windows, model=model)


def _run(
    options: SparsifyOptions,
    source: Source,
    decided: Decided,
    zeros: Mapping[str, int],
    calibration: Calibration | None,
    groups: Groups,
    tensors: Tensors,
    console: Console,
) -> Sparsity:
    """Prune, say what came of it, and put it on record."""
    from megatron_prune.engine.sparsify import Task, outlier_shares, sparsify

    layers = source.config.shape.num_layers
    grid = groups.grid
    text = "" if calibration is None else f", {calibration.model.dtype}"
    console.say(
        f"{options.method} on {len(decided.targets)} matrices at TP={grid.tensor_parallel} "
        f"DP={groups.data_parallel}{text}"
    )
    asked = decided.asked
    with console.bar("sparsify", unit="layer") as bar:
        progress = bar(layers * (2 if asked is None else 1))
        if asked is None:
            assert calibration is not None and options.sparsity is not None
            outliers = outlier_shares(
                source, decided.targets, options.owl_multiple, calibration, groups, progress
            )
            shares = by_outliers(outliers, options.sparsity, options.owl_lambda)
            asked = tuple(Asked(share=share) for share in shares)
            _check_room(source, decided.targets, asked, zeros)
        task = Task(
            method=decided.method,
            how=decided.how,
            asked=asked,
            targets=frozenset(decided.targets),
            true_sequential=options.true_sequential,
            upstream_statistics=options.upstream_statistics,
        )
        found = sparsify(source, task, calibration, groups, tensors, progress)
    record = _record(options, source, asked, calibration, groups, found)
    _tell(found, record, console)
    return record


def _record(
    options: SparsifyOptions,
    source: Source,
    asked: Sequence[Asked],
    calibration: Calibration | None,
    groups: Groups,
    found: Sparsified,
) -> Sparsity:
    name, how = options.how
    settings: dict[str, Any] = {
        **{key: value for key, value in asdict(how).items() if value != getattr(How(), key)},
        "sparsity_by_layer": options.sparsity_by_layer,
        "true_sequential": options.true_sequential,
        "tensor_parallel": groups.grid.tensor_parallel,
        "data_parallel": groups.data_parallel,
        "version": __version__,
    }
    if options.upstream_statistics:
        settings["upstream_statistics"] = True
    if calibration is not None:
        from megatron_prune.data.windows import data_digest

        windows = calibration.windows_WS
        settings |= {
            "dtype": calibration.model.dtype,
            "data_digest": data_digest(windows),
            "samples": len(windows),
            "seq_length": calibration.model.seq_length,
            "sampling": options.calibration_sampling,
        }
    sizes = {name: prod(tensor_shape(name, source.config.shape)) for name in found.matrices}
    total = sum(sizes.values())
    zeros = sum(sizes[name] * matrix.reached for name, matrix in found.matrices.items())
    wanted = sum(sizes[name] * matrix.asked for name, matrix in found.matrices.items())
    return Sparsity(
        method=name,
        sparsity=wanted / total if options.sparsity is None else options.sparsity,
        pattern=None if options.n_of_m is None else str(options.n_of_m),
        reached=zeros / total,
        settings=settings,
        source_digest=source.digest,
        tensors=found.matrices,
    )


def _tell(found: Sparsified, record: Sparsity, console: Console) -> None:
    errors = [matrix.error for matrix in record.tensors.values() if matrix.error is not None]
    error = f"; their outputs are {mean(errors):.4f} off on average" if errors else ""
    console.show(f"{record.reached:.4%} of {len(record.tensors)} matrices are zero{error}")
    off = [n for n, matrix in record.tensors.items() if abs(matrix.reached - matrix.asked) > _FAR]
    if off:
        matrix = record.tensors[off[0]]
        more = f", and so in {len(off) - 1} more" if len(off) > 1 else ""
        console.say(
            f"warning: {off[0]} has {matrix.reached:.2%} zeros where {matrix.asked:.2%} were asked "
            f"for{more}; {SPARSITY} has all"
        )
    if found.close:
        decisions = "1 decision was" if found.close == 1 else f"{found.close} decisions were"
        console.say(f"warning: {decisions} within rounding: another layout or machine may differ")
    for name, count in [*found.dead.items()][:_TOLD]:
        inputs = "1 input never fires" if count == 1 else f"{count} inputs never fire"
        console.say(f"warning: {name}: {inputs} on this text; weights of such inputs are 0")
    if len(found.dead) > _TOLD:
        console.say(f"warning: and the same of {len(found.dead) - _TOLD} more matrices")
