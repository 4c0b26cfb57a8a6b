"""What a stage can be asked: its options are a dataclass, and each field of it is a flag.

Name, type, default and help of a flag are written once, in the field; `cli.flags` makes arguments
of them. Fields without a `flag` are not asked for on the command line.
"""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

FLAG = "flag"
"""Key of a field's metadata that holds its `Flag`."""
_YEAR = 525_600  # minutes


@dataclass(frozen=True)
class Group:
    """Flags that are shown together in a stage's help; last those that many stages share."""

    title: str
    about: str | None = None
    is_last: bool = False


@dataclass(frozen=True, kw_only=True)
class Flag:
    """What the field of an option does not say by its name, type and default.

    Attributes:
        help: completes "--flag: ..."; the default is added to it, where it does not tell that.
        parse: makes the value of one word; None for the field's type.
        positional: the value stands alone, without its flag.
        also: other names of the flag.
        switches: value -> help; each is a flag of its own name, of which one can be given.
    """

    help: str
    group: Group | None = None
    metavar: str | tuple[str, ...] | None = None
    choices: Sequence[str] | None = None
    parse: Callable[[str], Any] | None = None
    positional: bool = False
    also: tuple[str, ...] = ()
    switches: Mapping[str, str] | None = None


def flag(
    help: str = "",
    *,
    default: Any = MISSING,
    group: Group | None = None,
    metavar: str | tuple[str, ...] | None = None,
    choices: Sequence[str] | None = None,
    parse: Callable[[str], Any] | None = None,
    positional: bool = False,
    also: tuple[str, ...] = (),
    switches: Mapping[str, str] | None = None,
) -> Any:
    """A field of an options dataclass that is a flag; without a default it has to be given."""
    told = Flag(
        help=help,
        group=group,
        metavar=metavar,
        choices=choices,
        parse=parse,
        positional=positional,
        also=also,
        switches=switches,
    )
    return field(default=default, metadata={FLAG: told})


def flag_name(field_name: str) -> str:
    """``seq_length`` -> ``--seq-length``."""
    return "--" + field_name.replace("_", "-")


def positive(text: str) -> int:
    """An integer of 1 or more, for ``parse``."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise ArgumentTypeError(f"{text!r}: wanted an integer of 1 or more")
    return value


def minutes(text: str) -> float:
    """How long to wait, above 0 and at most a year, for ``parse``."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= _YEAR:
        raise ArgumentTypeError(f"{text!r}: wanted minutes, above 0 and at most {_YEAR}")
    return value


def given(options: Any, of: Any = None, *, groups: Sequence[Group] = ()) -> tuple[str, ...]:
    """The names of the fields that differ from their default: what was asked for.

    Args:
        of: the class whose fields count, where the options inherit from several.
        groups: those whose fields count; empty for all.
    """
    return tuple(
        one.name
        for one in fields(of or options)
        if FLAG in one.metadata
        and (not groups or one.metadata[FLAG].group in groups)
        and getattr(options, one.name) != one.default
    )


def given_flags(options: Any, *groups: Group) -> tuple[str, ...]:
    """`given` as it is typed: ``--seq-length``, and ``--bf16`` for a ``dtype`` with switches."""
    told = {one.name: one.metadata[FLAG] for one in fields(options) if FLAG in one.metadata}
    return tuple(
        flag_name(getattr(options, name) if told[name].switches else name)
        for name in given(options, groups=groups)
    )
