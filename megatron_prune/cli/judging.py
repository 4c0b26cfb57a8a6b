"""What `plan --evaluate-data` tries shapes with: the real loss of plans, in this process."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_prune.cli import options
from megatron_prune.cli.terminal import Terminal
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.planning.search import shape_words
from megatron_prune.sources.source import Source

Losses = Callable[[Sequence[PrunePlan], str], list[float]]
"""(plans, what to call them) -> the loss of each; the first is the source's."""


@contextmanager
def judging(args: argparse.Namespace, source: Source) -> Iterator[Losses | None]:
    """What finds the real loss of plans, on this machine; None without a text."""
    if args.evaluate_data is None:
        yield None
        return
    from megatron_prune.engine.forward.model import ModelOptions, check_model
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.evaluate.candidates import CandidateRepair, Judge
    from megatron_prune.evaluate.options import EvaluateOptions
    from megatron_prune.model.grid import ParallelGrid

    seq_length = args.evaluate_seq_length or 1024
    check_model(source.config, ModelOptions(seq_length=seq_length), 1)
    evaluation = EvaluateOptions(
        load=args.load,
        data=args.evaluate_data,
        seq_length=seq_length,
        max_windows=args.max_windows or 16,
        family=args.family,
    )
    repair = None
    if args.repair_data is not None:
        repair = CandidateRepair(
            data=args.repair_data,
            samples=args.repair_samples or 16,
            seq_length=seq_length,
        )
    with model_parallel(ParallelGrid()) as groups:
        judge = Judge(
            source,
            evaluation,
            groups,
            bar=lambda: Terminal().bar("", unit="window"),
            repair=repair,
            cache=args.cache,
            scratch=args.save if args.dry_run or args.cache is None else args.cache,
            dry_run=args.dry_run,
        )

        def losses(plans: Sequence[PrunePlan], what: str) -> list[float]:
            def tell(number: int, loss: float, was_cached: bool) -> None:
                name = f"{what} {number} of {len(plans) - 1}" if number else "source"
                options.say(
                    f"{name}: {shape_words(plans[number].target)}: loss {loss:.4f}"
                    f"{' (cached)' if was_cached else ''}"
                )

            return judge.losses(plans, tell)

        yield losses
