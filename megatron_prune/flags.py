"""What a stage can be asked: its options are a dataclass, and each field of it is a flag.

Name, type, default and help of a flag are written once, in the field; `cli.flags` makes arguments
of them. Fields without a `flag` are not asked for on the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

FLAG = "flag"
"""Key of a field's metadata that holds its `Flag`."""


@dataclass(frozen=True)
class Group:
    """Flags that are shown together in a stage's help."""

    title: str
    about: str | None = None


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What the field of an option does not say by its name, type and default.

    Attributes:
        help: completes "--flag: ..."; the default is added to it.
        parse: makes the value of one word; None for the field's type.
        positional: the value stands alone, without its flag.
    """

    help: str
    group: Group | None = None
    metavar: str | tuple[str, ...] | None = None
    choices: Sequence[str] | None = None
    parse: Callable[[str], Any] | None = None
    positional: bool = False


def flag(
    help: str,
    *,
    default: Any = MISSING,
    group: Group | None = None,
    metavar: str | tuple[str, ...] | None = None,
    choices: Sequence[str] | None = None,
    parse: Callable[[str], Any] | None = None,
    positional: bool = False,
) -> Any:
    """A field of an options dataclass that is a flag; without a default it has to be given."""
    told = Flag(
        help=help,
        group=group,
        metavar=metavar,
        choices=choices,
        parse=parse,
        positional=positional,
    )
    return field(default=default, metadata={FLAG: told})


def flag_name(field_name: str) -> str:
    """``seq_length`` -> ``--seq-length``."""
    return "--" + field_name.replace("_", "-")


def given(options: Any) -> tuple[str, ...]:
    """The names of the fields that differ from their default: what was asked for."""
    return tuple(
        one.name
        for one in fields(options)
        if FLAG in one.metadata and getattr(options, one.name) != one.default
    )
