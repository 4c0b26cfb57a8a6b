"""Being asked to stop: finish the step, save, leave with exit code 75."""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ECHO_SECONDS = 0.5


class StopSignals:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1; a second one ends the process at once.

    torchrun passes a signal on that the terminal has sent to its ranks as well: what comes within
    half a second of the first is taken for the same.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._since = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > _ECHO_SECONDS:
            print(f"second signal ({signal.Signals(number).name}): leaving", file=sys.stderr)
            os._exit(128 + number)
