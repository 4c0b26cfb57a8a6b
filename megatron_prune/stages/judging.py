"""What `plan --evaluate-data` tries shapes with: the real loss of plans, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.search import shape_words
from megatron_prune.sources.source import Source
from megatron_prune.stages.budgets import SearchFlags
from megatron_prune.stages.console import Console

Losses = Callable[[Sequence[PrunePlan], str], list[float]]
"""(plans, what to call them) -> the loss of each; the first is the source's."""


@contextmanager
def judging(options: SearchFlags, source: Source, console: Console) -> Iterator[Losses | None]:
    """What finds the real loss of plans, on this machine; None without a text."""
    if options.evaluate_data is None:
        yield None
        return
    from megatron_prune.engine.forward.model import ModelOptions, check_model
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.evaluate.candidates import CandidateRepair, Judge
    from megatron_prune.evaluate.options import EvaluateOptions
    from megatron_prune.model.grid import ParallelGrid

    seq_length = options.evaluate_seq_length
    check_model(source.config, ModelOptions(seq_length=seq_length), 1)
    evaluation = EvaluateOptions(
        load=options.load,
        data=options.evaluate_data,
        seq_length=seq_length,
        max_windows=options.max_windows,
        family=options.family,
    )
    repair = None
    if options.repair_data is not None:
        repair = CandidateRepair(
            data=options.repair_data,
            samples=options.repair_samples,
            seq_length=seq_length,
        )
    with model_parallel(ParallelGrid()) as groups:
        judge = Judge(
            source,
            evaluation,
            groups,
            bar=lambda: console.bar("", unit="window"),
            repair=repair,
            cache=options.cache,
            scratch=options.save if options.dry_run or options.cache is None else options.cache,
            dry_run=options.dry_run,
        )

        def losses(plans: Sequence[PrunePlan], what: str) -> list[float]:
            def tell(number: int, loss: float, was_cached: bool) -> None:
                name = f"{what} {number} of {len(plans) - 1}" if number else "source"
                console.say(
                    f"{name}: {shape_words(plans[number].target)}: loss {loss:.4f}"
                    f"{' (cached)' if was_cached else ''}"
                )

            return judge.losses(plans, tell)

        yield losses
