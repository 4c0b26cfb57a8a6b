"""What a stage says while it works: nothing, unless somebody listens.

A stage returns what it found. What a user wants to hear on the way goes through a `Console`, which
the command line replaces by one that prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    def __call__(self, done: int, note: str = "") -> object:
        """So many parts more are done; the note stands at the bar's end."""


class Console:
    """One that nobody listens to."""

    def say(self, message: str) -> None:
        """A message to the user."""

    def show(self, text: str) -> None:
        """A part of the result, before the whole is there."""

    @contextmanager
    def bar(
        self, what: str, *, unit: str, stays: bool = True
    ) -> Iterator[Callable[[int], Progress]]:
        """A progress bar: called with the total, it gives what is told of each part done.

        Args:
            unit: ``B`` for bytes, ``it`` for values, both counted in thousands; else the word for
                one.
            stays: on the screen when all is done.
        """
        yield lambda total: lambda done, note="": None


SILENT = Console()
