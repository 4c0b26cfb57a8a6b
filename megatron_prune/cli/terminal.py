"""The console of the command line: results on standard output, all else on standard error, from the
first rank only."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import megatron_prune
from megatron_prune.ranks import is_first_rank
from megatron_prune.stages.console import Console, Progress

_PACKAGE = Path(megatron_prune.__file__).parent


class Terminal(Console):
    def say(self, message: str) -> None:
        if is_first_rank():
            print(f"megatron-prune: {message}", file=sys.stderr)

    def show(self, text: str) -> None:
        if is_first_rank():
            print(text, flush=True)

    @contextmanager
    def bar(
        self, what: str, *, unit: str, stays: bool = True
    ) -> Iterator[Callable[[int], Progress]]:
        """With rate and time left; ended whatever happens."""
        from tqdm import tqdm

        with ExitStack() as bars:

            def start(total: int) -> Progress:
                bar = tqdm(
                    total=total,
                    desc=what,
                    unit=unit,
                    unit_scale=unit in ("B", "it"),
                    disable=not is_first_rank(),
                    mininterval=0.5,
                    leave=stays,
                )
                bars.enter_context(bar)

                def tell(done: int, note: str = "") -> None:
                    if note:
                        bar.set_postfix_str(note, refresh=False)
                    bar.update(done)

                return tell

            yield start

    @contextmanager
    def warnings(self) -> Iterator[None]:
        """Has warnings of ours in the block said in one line, as `say` does, at once; others are
        shown as they would be."""
        with warnings.catch_warnings():
            others = warnings.showwarning

            def show(message: Warning | str, kind: Any, filename: str, *more: Any) -> None:
                if kind is UserWarning and Path(filename).is_relative_to(_PACKAGE):
                    self.say(f"warning: {message}")
                else:
                    others(message, kind, filename, *more)

            warnings.showwarning = show  # type: ignore[assignment]
            warnings.filterwarnings("always", category=UserWarning, module="megatron_prune")
            yield
