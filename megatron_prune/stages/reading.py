"""Weights that are looked at before anything is decided about them."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from megatron_prune.model.axes import names
from megatron_prune.model.costs import weight_bytes
from megatron_prune.sources.finite import FiniteSource, nonfinite_text
from megatron_prune.sources.source import Source
from megatron_prune.stages.console import Console
from megatron_prune.store.writer import row_blocks

_TOLD = 4  # tensors that a warning names


def check_weights(source: Source, console: Console, *, allow: bool) -> None:
    """Read every weight once and refuse, or tell of, those that are not finite.

    Costs one reading of the model: 0.05 s of SmolLM2 when it lies in memory.

    Raises:
        DamagedError: some are not finite, and that is not allowed; names tensor and number.
    """
    checked, config = FiniteSource(source, allow=allow), source.config
    reads = [read for name in names(config) for read in row_blocks(checked, name, config.shape)]
    with (
        ThreadPoolExecutor(max_workers=4) as pool,
        console.bar("weights", unit="B", stays=False) as start,
    ):
        tell = start(weight_bytes(config))
        for done in pool.map(lambda read: read().nbytes, reads):
            tell(done)
    tell_nonfinite(source, [checked.found], console)


def tell_nonfinite(source: Source, found: Iterable[Iterable[str]], console: Console) -> None:
    """Say which tensors hold values that are not finite, as far as every rank has found."""
    wrong = sorted(set(chain.from_iterable(found)))
    for name in wrong[:_TOLD]:
        console.say(f"warning: {nonfinite_text(source, name)}")
    if len(wrong) > _TOLD:
        console.say(f"warning: and {len(wrong) - _TOLD} more tensors with such values")
