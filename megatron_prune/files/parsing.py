"""Files that somebody wrote, JSON or YAML: read within bounds, or refused by an error of ours.

A parser is a stranger's loop over a stranger's bytes. The standard ones raise a dozen kinds of
errors (a date of month 99, a number of 5000 digits, ten thousand brackets, half of a surrogate pair
that fails only when it is printed), and what they do accept can still end a later loop or
recursion. So every such file is read here. What its values mean is for the reader to say, inside of
`checked_as`.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from megatron_prune.errors import PruneError
from megatron_prune.files.contents import foreign_text

JSON_BYTES = 1 << 27  # the largest tokenizer.json and plans of the largest models take a third
YAML_BYTES = 1 << 20  # its parser takes a second for as much
_DEPTH = 64  # of values in values; ours have 5
_YAML_VALUES = 100_000  # aliases written out: a few lines can name billions
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
_RAISED = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(RuntimeError, MemoryError, EOFError, SyntaxError),
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, struct.error),
)
"""What code raises that takes a file's bytes and values for what they should be."""


@contextmanager
def checked_as(
    kind: type[PruneError], where: object, what: str, advice: str = ""
) -> Iterator[None]:
    """A block in which somebody's file is taken for what it should be.

    Args:
        where: the beginning of the message: the path, with its flag where there is one.
        what: what the file is then not, such as ``not a plan``.
        advice: the message's end.

    Raises:
        kind: the block raised anything that wrong values or a missing file cause, or an error of
            ours, which ``where`` is put in front of.
    """
    try:
        yield
    except PruneError as error:
        raise kind(f"{where}: {error}{advice}") from None
    except OSError as error:
        raise kind(f"{where}: {error.strerror or error}{advice}") from None
    except _RAISED as error:
        raise kind(f"{where}: {what}: {_reason(error)}{advice}") from None


def _reason(error: BaseException) -> str:
    """In one line; a bare key or nothing does not tell what is wrong without the error's name."""
    said = " ".join(str(error).split())[:300]
    if isinstance(error, KeyError):
        return f"{said} is missing"
    if isinstance(error, RecursionError):
        return "values too deep inside of each other"
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__} {said}"


def parse_json(data: bytes | str, *, unique: bool = False) -> Any:
    """The values of a JSON text.

    Args:
        unique: refuse an object that has a key twice; else the last one counts, as it does for
            transformers.

    Raises:
        ValueError: it is none, not UTF-8, or holds what no file of this kind does.
    """
    text = data if isinstance(data, str) else data.decode()
    try:
        values = json.loads(text, object_pairs_hook=_table_of_unique if unique else None)
    except RecursionError as error:
        raise ValueError(_reason(error)) from None
    _check_values(values, looks_inside=_HALF_PAIR.search(text) is not None)
    return values


def parse_yaml(data: bytes | str) -> Any:
    """The values of a YAML text; ``2:4`` is a word, as in YAML 1.2, not 2 x 60 + 4 as in 1.1.

    Raises:
        ValueError: as `parse_json`, or its aliases stand for too many values.
    """
    import yaml

    text = data if isinstance(data, str) else data.decode()
    try:
        values = yaml.load(text, _yaml_loader())
    except (yaml.YAMLError, *_RAISED) as error:
        raise ValueError(_reason(error)) from None
    _check_values(values, looks_inside=True, most=_YAML_VALUES)
    return values


@cache
def _yaml_loader() -> Any:
    """PyYAML's safe loader, but for numbers to the base of 60."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    for word in ("int", "float"):
        plain = getattr(yaml.SafeLoader, f"construct_yaml_{word}")

        def number(loader: Any, node: Any, plain: Any = plain) -> Any:
            text = loader.construct_scalar(node)
            return text if ":" in text else plain(loader, node)

        Loader.add_constructor(f"tag:yaml.org,2002:{word}", number)
    return Loader


def read_json(
    path: Path,
    kind: type[PruneError],
    what: str = "not JSON",
    *,
    flag: str = "",
    advice: str = "",
    unique: bool = False,
) -> Any:
    """The values of a JSON file.

    Args:
        what, advice: see `checked_as`; ``flag`` names the file, for the message.
        unique: see `parse_json`.

    Raises:
        kind: it cannot be read, or is none.
    """
    with checked_as(kind, f"{flag} {path}".strip(), what, advice):
        data = _read_bytes(path, JSON_BYTES)
        with _named_for_what_it_is(path):
            return parse_json(data, unique=unique)


def read_table(
    path: Path, kind: type[PruneError], what: str = "not JSON", *, flag: str = "", advice: str = ""
) -> dict[str, Any]:
    """`read_json` of a file that holds one object.

    Raises:
        kind: it does not; see `read_json`.
    """
    values = read_json(path, kind, what, flag=flag, advice=advice)
    with checked_as(kind, f"{flag} {path}".strip(), what, advice):
        if not isinstance(values, dict):
            raise ValueError(f"holds a {type(values).__name__}, wanted an object")
        return values


def read_yaml(path: Path, kind: type[PruneError], what: str = "not YAML", *, flag: str = "") -> Any:
    """The values of a YAML file.

    Raises:
        kind: it cannot be read, or is none.
    """
    with checked_as(kind, f"{flag} {path}".strip(), what):
        data = _read_bytes(path, YAML_BYTES)
        with _named_for_what_it_is(path):
            return parse_yaml(data)


@contextmanager
def _named_for_what_it_is(path: Path) -> Iterator[None]:
    """A block that parses a file: where it cannot, ValueError tells what the file is instead."""
    try:
        yield
    except ValueError:
        if what := foreign_text(path):
            raise ValueError(what) from None
        raise


def check_header(path: Path, most: int) -> None:
    """Refuse a safetensors file whose header, which is JSON, is longer than what it is for takes.

    Raises:
        ValueError: it is; the library takes a minute and a gigabyte for a million names.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        found = int.from_bytes(file.read(8), "little")
    if found > most:
        raise ValueError(f"a header of {found} bytes; wanted at most {most} for what it is to hold")


def _read_bytes(path: Path, most: int) -> bytes:
    """Raises OSError, or ValueError for what is too large or no file (a pipe never ends)."""
    if path.exists() and not path.is_file():
        raise ValueError("is no file")
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"is larger than {most >> 20} MiB")
    return data


def _table_of_unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in table if names.count(name) > 1)
        raise ValueError(f"{twice!r:.60} stands twice")
    return table


def _check_values(values: Any, *, looks_inside: bool, most: float = float("inf")) -> None:
    """Refuse values too deep inside of each other, or too many.

    Args:
        looks_inside: refuse text that cannot be encoded, and numbers that cannot be printed, too.

    Raises:
        ValueError: says which.
    """
    count, level = 0, [values]
    for _ in range(_DEPTH):
        if looks_inside:
            for x in level:
                for one in (x, *x) if isinstance(x, dict) else (x,):
                    str(one if isinstance(one, str | int) else "").encode()
        level = [
            inner
            for x in level
            if isinstance(x, dict | list)
            for inner in (x.values() if isinstance(x, dict) else x)
            if looks_inside or isinstance(inner, dict | list)
        ]
        count += len(level)
        if count > most:
            raise ValueError(f"its aliases stand for more than {most} values")
        if not level:
            return
    raise ValueError(f"values more than {_DEPTH} deep inside of each other")
