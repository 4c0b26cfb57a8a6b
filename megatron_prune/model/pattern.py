"""N:M sparsity: its one grammar, for flags and records."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_prune.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """N:M, N kept of every M consecutive inputs of a row."""

    keep: int
    group: int

    @classmethod
    def of(cls, text: str) -> Pattern | None:
        """``2:4`` -> two kept of four; None for what is not N:M with 0 < N < M."""
        found = re.fullmatch("([0-9]{1,4}):([0-9]{1,4})", text)
        if found is None or not 0 < int(found[1]) < int(found[2]):
            return None
        return cls(keep=int(found[1]), group=int(found[2]))

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """`of` for ``--pattern``.

        Raises:
            ConfigError: not N:M with 0 < N < M.
        """
        if (found := cls.of(text)) is None:
            raise ConfigError(
                f"--pattern {text}: wanted N:M, N kept of every M consecutive inputs, 0 < N < M, "
                "such as 2:4"
            )
        return found

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"
