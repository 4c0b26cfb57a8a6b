"""What a stage says while it works: nothing, unless somebody listens.

A stage returns what it found. What a user wants to hear on the way goes through a `Console`, which
the command line replaces by one that prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Console:
    """One that nobody listens to."""

    def say(self, message: str) -> None:
        """A message to the user."""

    def show(self, text: str) -> None:
        """A part of the result, before the whole is there."""

    @contextmanager
    def bar(self, what: str, *, unit: str) -> Iterator[Callable[[int], Callable[[int], object]]]:
        """A progress bar: called with the total, it gives what is told of each part done.

        Args:
            unit: ``B`` for bytes, else the word for one.
        """
        yield lambda total: lambda done: None

    def warnings(self) -> AbstractContextManager[None]:
        """Takes the warnings of a block, which are left alone here."""
        return nullcontext()


SILENT = Console()
