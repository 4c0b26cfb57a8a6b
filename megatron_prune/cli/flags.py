"""Arguments from the fields of an options dataclass, and the dataclass from the arguments.

A ``bool`` is a switch, one that may be None has a ``--no-`` too; ``X | None`` may be left out,
``tuple[X, ...]`` takes one or more words and ``tuple[X, X, X]`` as many as it has types; ``Path``,
``int``, ``float`` and ``str`` make a value of one word.
"""

from __future__ import annotations

import argparse
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from megatron_prune.flags import FLAG, Flag, Group, flag_name

Options = TypeVar("Options")


def add_flags(parser: argparse.ArgumentParser, options: type) -> None:
    """The flags of an options dataclass, each in its group, in the order of the fields."""
    types = get_type_hints(options)
    groups: dict[Group, argparse._ArgumentGroup] = {}
    for one in sorted(_flags_of(options), key=_is_last):
        told: Flag = one.metadata[FLAG]
        place: Any = parser
        if told.group is not None:
            if told.group not in groups:
                groups[told.group] = parser.add_argument_group(told.group.title, told.group.about)
            place = groups[told.group]
        if told.switches is not None:
            either = place.add_mutually_exclusive_group()
            shared = {"action": "store_const", "dest": one.name, "default": one.default}
            for value, help in told.switches.items():
                either.add_argument(flag_name(value), const=value, help=help, **shared)
            continue
        names = (one.name,) if told.positional else (flag_name(one.name), *told.also)
        place.add_argument(*names, **_argument(one, told, _without_none(types[one.name])))


def _flags_of(options: type) -> list[Field[Any]]:
    return [one for one in fields(options) if FLAG in one.metadata]


def _is_last(one: Field[Any]) -> bool:
    group = one.metadata[FLAG].group
    return group is not None and group.is_last


def _without_none(kind: Any) -> Any:
    """``X | None`` -> X."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    return kind


def _argument(one: Field[Any], told: Flag, kind: Any) -> dict[str, Any]:
    """The keywords of ``add_argument``."""
    is_required = one.default is MISSING
    if kind is bool:
        action = argparse.BooleanOptionalAction if one.default is None else "store_true"
        return {"action": action, "help": told.help}
    shown = one.default not in (MISSING, None, ()) and "(default" not in told.help
    keywords: dict[str, Any] = {
        "help": f"{told.help} (default: {_words(one.default)})" if shown else told.help,
        "metavar": told.metavar,
        "choices": told.choices,
        "default": None if is_required else one.default,
    }
    if get_origin(kind) is tuple:
        kind, *more = get_args(kind)
        keywords["nargs"] = "+" if more == [Ellipsis] else 1 + len(more)
    keywords["type"] = told.parse or (_path if kind is Path else kind)
    if not told.positional:
        keywords["required"] = is_required
    return keywords


def _path(text: str) -> Path:
    """A path; `Path` takes an empty word, such as a variable that is not set, for the directory
    that the command runs in."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a path")
    return Path(text)


def _words(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(_words, default))
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    return str(default).replace("%", "%%")


def options_from(args: argparse.Namespace, options: type[Options], **more: Any) -> Options:
    """The options that the arguments ask for; ``more`` has the fields that are not flags."""
    values = {}
    for one in fields(options):  # type: ignore[arg-type]
        if FLAG in one.metadata:
            value = getattr(args, one.name)
            values[one.name] = tuple(value) if isinstance(value, list) else value
        elif one.name in more:
            values[one.name] = more[one.name]
    return options(**values)
