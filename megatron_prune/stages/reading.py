"""Weights that are looked at before anything is decided about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from math import prod

from megatron_prune.model.axes import axes_of, names, split_layer, tensor_shape
from megatron_prune.model.lazy import Tensor
from megatron_prune.planning.plan import PrunePlan
from megatron_prune.sources.finite import FiniteSource
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
    checked = FiniteSource(source, allow=allow)
    _read_through(checked, names(source.config), console)
    tell_nonfinite(checked.texts, console)


def check_what_goes(checked: FiniteSource, plan: PrunePlan, console: Console) -> None:
    """Look at what a `PrunedSource` of ``checked`` will not read: the layers that go, and the
    rows of tokens where some go. Whoever then reads the pruned model has looked at all of it."""
    stay = {None, *plan.layers}
    cuts_rows = plan.kept.vocab is not None
    going = [
        name
        for name in names(checked.config)
        if split_layer(name)[0] not in stay or (cuts_rows and "V" in axes_of(name))
    ]
    _read_through(checked, going, console)


def _read_through(source: Source, tensors: Iterable[str], console: Console) -> None:
    shape, total = source.config.shape, 0
    reads: list[Callable[[], Tensor]] = []
    for name in tensors:
        total += prod(tensor_shape(name, shape)) * source.dtype(name).itemsize
        reads += row_blocks(source, name, shape)
    if not reads:
        return
    with (
        ThreadPoolExecutor(max_workers=4) as pool,
        console.bar("weights", unit="B", stays=False) as start,
    ):
        tell = start(total)
        for done in pool.map(lambda read: read().nbytes, reads):
            tell(done)


def tell_nonfinite(texts: Iterable[str], console: Console) -> None:
    """Say what is wrong with tensors that hold values that are not finite."""
    wrong = sorted(set(texts))
    for text in wrong[:_TOLD]:
        console.say(f"warning: {text}")
    if len(wrong) > _TOLD:
        console.say(f"warning: and {len(wrong) - _TOLD} more tensors with such values")
