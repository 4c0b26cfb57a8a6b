"""The real loss of several plans of one model, without writing any of them.

Each plan is seen through (`PrunedSource`), repaired when that is asked for, loaded and scored on
the same text. What was found is kept in a directory, one small file a plan, so that a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_prune import __version__
from megatron_prune.data.windows import data_digest, model_windows
from megatron_prune.engine.forward.model import ModelOptions
from megatron_prune.engine.groups import Groups
from megatron_prune.engine.observe.layerwise import norm_energy
from megatron_prune.engine.repair import repair_projections, rescale_norms
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.evaluate.options import Bar, EvaluateOptions
from megatron_prune.evaluate.text import evaluate
from megatron_prune.files import hash_file, replace_file
from megatron_prune.parsing import checked_as, read_table
from megatron_prune.planning.fit import Fit
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.pruned import PrunedSource
from megatron_prune.sources.repair_record import Replaced
from megatron_prune.sources.replaced import RepairedSource, Tensors
from megatron_prune.sources.source import Source
from megatron_prune.store.commit import scratch_directory


@dataclass(frozen=True, kw_only=True)
class CandidateRepair:
    """Repair every plan before it is scored, as ``prune --repair --norm-rescale`` would."""

    data: Path
    samples: int
    seq_length: int


class Judge:
    """Finds the mean nats a token of plans' models on the text of ``options``; in one process.

    Costs, for each plan that is not in the cache, reading the pruned model and a forward of the
    windows; a repair costs a few forwards of its own samples. Holds one model at a time.

    Args:
        cache: directory; made when it is not there.
        scratch: what the repaired tensors lie beside meanwhile.
        dry_run: the cache is read, not added to.

    Raises:
        ConfigError: a text that does not fit, or a cache that is no directory.
    """

    def __init__(
        self,
        source: Source,
        options: EvaluateOptions,
        groups: Groups,
        *,
        bar: Bar,
        scratch: Path,
        repair: CandidateRepair | None = None,
        cache: Path | None = None,
        dry_run: bool = False,
    ) -> None:
        self._source, self._options, self._groups, self._bar = source, options, groups, bar
        self._cache, self._writes = cache, cache is not None and not dry_run
        if cache is not None and self._writes:
            try:
                cache.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(
                    f"--cache {cache}: {error.strerror}; wanted a directory"
                ) from None
        self._repairs = None
        if repair is not None:
            self._repairs = _Repairs(source, options, repair, groups, scratch)
        self._common = _common_key(options, repair, self._repairs)

    def losses(
        self,
        plans: Sequence[PrunePlan],
        tell: Callable[[int, float, bool], object] = lambda number, loss, was_cached: None,
    ) -> list[float]:
        """The loss of each plan.

        Args:
            tell: called after each plan with its place, its loss, and whether it was cached.

        Raises:
            DamagedError: a loss that is not a number, or a file in the cache that is not ours.
        """
        found = []
        for number, plan in enumerate(plans):
            key = {"source_digest": plan.source_digest, "plan_digest": plan.digest, **self._common}
            file = None if self._cache is None else self._cache / _file(key)
            loss = None if file is None else _cached(file, key)
            was_cached = loss is not None
            if loss is None:
                loss = self._loss(plan)
                if file is not None and self._writes:
                    text = json.dumps({**key, "loss": loss}, indent=1) + "\n"
                    replace_file(file, text.encode())
            tell(number, loss, was_cached)
            found.append(loss)
        return found

    def _loss(self, plan: PrunePlan) -> float:
        pruned = PrunedSource(self._source, plan)
        if self._repairs is None:
            return float(evaluate(pruned, self._options, self._groups, self._bar)["loss"])
        with self._repairs.of(plan, pruned) as repaired:
            return float(evaluate(repaired, self._options, self._groups, self._bar)["loss"])


class _Repairs:
    """What the repairs of all plans share: the calibration windows and, once they have been
    observed, the energies of the source's norms."""

    def __init__(
        self,
        source: Source,
        options: EvaluateOptions,
        repair: CandidateRepair,
        groups: Groups,
        scratch: Path,
    ) -> None:
        self._scratch = scratch.with_name(f"{scratch.name}.repair")
        self._source, self._groups = source, groups
        self._model = ModelOptions(seq_length=repair.seq_length, dtype=options.dtype)
        self.windows, _ = model_windows(
            repair.data,
            options.tokenizer_path,
            seq_length=repair.seq_length,
            max_windows=repair.samples,
            vocab_size=source.config.shape.vocab_size,
        )
        self._energy: Tensor | None = None

    @contextmanager
    def of(self, plan: PrunePlan, pruned: Source) -> Iterator[Source]:
        """The pruned model with its repair, whose tensors lie in a scratch directory meanwhile."""
        kept = plan.kept
        with scratch_directory(self._scratch, ranks=self._groups.ranks) as folder:
            into, rescaled = Tensors(folder), dict[str, Replaced]()
            if kept.hidden is not None:
                if self._energy is None:
                    self._energy = norm_energy(
                        self._source, self.windows, self._groups, self._model
                    )
                rescaled = rescale_norms(self._source, plan, self._energy, self._groups, into)
            fit = Fit.for_plan(plan)
            if fit.fits(plan):
                repair_projections(
                    self._source, plan, self.windows, fit, self._model, self._groups, into, rescaled
                )
            yield RepairedSource(pruned, into)


def _common_key(
    options: EvaluateOptions, repair: CandidateRepair | None, repairs: _Repairs | None
) -> dict[str, Any]:
    """All that the losses depend on but the plan."""
    assert options.data is not None
    how: dict[str, Any] | None = None
    if repair is not None and repairs is not None:
        how = {**asdict(repair), "data": data_digest(repairs.windows)}
    return {
        "version": __version__,
        "data_sha256": hash_file(options.data).sha256,
        "seq_length": options.window_length,
        "max_windows": options.max_windows,
        "dtype": options.dtype,
        "tokenizer": str(options.tokenizer_model) if options.tokenizer_model else "the model's",
        "repair": how,
    }


def _file(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24] + ".json"


def _cached(path: Path, key: dict[str, Any]) -> float | None:
    """The loss in a cache's file, None when there is none."""
    if not path.is_file():
        return None
    what, advice = "not what was written here", "; remove it, it is made again"
    values = read_table(path, DamagedError, what, flag="--cache", advice=advice)
    with checked_as(DamagedError, f"--cache {path}", what, advice):
        loss = float(values.pop("loss"))
        if values != key:
            raise ValueError("of another model or other data")
        return loss
