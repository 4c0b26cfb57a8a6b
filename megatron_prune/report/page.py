"""A report as one HTML file that needs nothing else: sections of text, tables and pictures.

This file knows nothing of plans or scores: `report.sections` says what is shown, and another kind
of report is another list of sections. The same inputs give the same bytes: there is no date in the
page. A policy in its head forbids the browser to load anything.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from megatron_prune import __version__
from megatron_prune.errors import ConfigError, StorageError
from megatron_prune.files import replace_file
from megatron_prune.report.pictures import Picture, as_png, as_svg

Rows = Iterable[Sequence[object]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells as text. The first column is a heading; numbers stand to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The numbers behind pictures: a CSV file, whose rows are made when it is written."""

    name: str
    header: Sequence[str]
    rows: Callable[[], Rows]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One heading and what stands below it, in order. ``text`` is plain."""

    anchor: str
    title: str
    text: str = ""
    parts: Sequence[Table | Picture] = ()
    sheets: Sequence[Sheet] = field(default_factory=tuple)


def slug(*words: str) -> str:
    """A user's words as a file name and an anchor; empty ones and the suffix of JSON files go."""
    kept = (word.removesuffix(".json").lower() for word in words if word)
    return re.sub(r"[^a-z0-9_-]+", "-", "-".join(kept)).strip("-") or "x"


def in_words(value: Any) -> str:
    """A value out of a JSON file for a table's cell."""
    if isinstance(value, dict) and value:
        return ", ".join(f"{key}: {in_words(x)}" for key, x in value.items())
    if isinstance(value, bool) or not isinstance(value, int | str):
        return json.dumps(value, sort_keys=True)
    return f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)


def with_unique_names(sections: Sequence[Section]) -> list[Section]:
    """The sections, with a number after the name of a picture, or a sheet, that stood before."""
    pictures: set[str] = set()
    sheets: set[str] = set()
    named = []
    for section in sections:
        parts = [
            replace(part, name=_free(part.name, pictures)) if isinstance(part, Picture) else part
            for part in section.parts
        ]
        of = [replace(sheet, name=_free(sheet.name, sheets)) for sheet in section.sheets]
        named.append(replace(section, parts=parts, sheets=of))
    return named


def _free(name: str, taken: set[str]) -> str:
    number, found = 1, name
    while found.lower() in taken:  # some file systems do not tell a from A
        number, found = number + 1, f"{name}-{number + 1}"
    taken.add(found.lower())
    return found


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0;
  --paper: #ffffff; --shade: #f6f8fa; --link: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --shade: #161b22; --link: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--ink);
  background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem;
  padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p { max-width: 48rem; overflow-wrap: anywhere; }
p, figcaption, caption, summary, footer { color: var(--soft); }
main > section:first-child > p { color: var(--ink); font-size: 1.05rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .8rem 0; }
a { color: var(--link); text-decoration: none; } a:hover { text-decoration: underline; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .6rem 0 1.2rem;
  font-size: .87rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; overflow-wrap: break-word; min-width: 4rem; }
td:last-child:not(.n) { min-width: 11rem; }
td.n, th.n { text-align: right; white-space: nowrap; } tbody th { font-weight: 400; }
figure { margin: 1rem 0 1.6rem; } figcaption, summary { font-size: .87rem; max-width: 48rem; }
figure svg { display: block; max-width: 100%; height: auto; margin-top: .4rem; }
details { margin: .4rem 0; } summary { cursor: pointer; } footer { margin-top: 3rem; }
@media print { :root { font-size: 12px;
  color-scheme: light; --ink: #000; --soft: #333; --line: #bbb;
  --paper: #fff; --link: #000; } body { max-width: none; padding: 0; font-size: 12px; } nav,
  details:not([open]) { display: none; } figure, tr, p { break-inside: avoid; }
  figure svg { max-height: 19cm; } footer { margin-top: 1rem; }
  h2, section > p, figcaption { break-after: avoid; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page_html(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page."""
    links = "".join(f'<a href="#{escape(s.anchor)}">{escape(s.title)}</a>' for s in sections)
    body = "".join(map(_section_html, sections))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(subtitle)}</p>\n"
        f'<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}</main>\n'
        f"<footer>megatron-prune {__version__}</footer>\n</body></html>\n"
    )


def _section_html(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>\n" if section.text else ""
    parts = "".join(
        _table_html(part) if isinstance(part, Table) else _picture_html(part)
        for part in section.parts
    )
    return (
        f'<section id="{escape(section.anchor)}"><h2>{escape(section.title)}</h2>\n'
        f"{text}{parts}</section>\n"
    )


def _picture_html(picture: Picture) -> str:
    caption, svg = escape(picture.caption), as_svg(picture)
    label = f'<svg role="img" aria-label="{caption}"'
    svg = svg.replace("<svg", label, 1)
    if picture.is_folded:
        return f"<details><summary>{caption}</summary><figure>{svg}</figure></details>\n"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>\n"


def _table_html(table: Table) -> str:
    def cell(tag: str, text: str, attributes: str = "") -> str:
        return f"<{tag}{attributes}>{escape(text)}</{tag}>"

    right = [
        bool(table.rows) and all(_is_number(row[n]) for row in table.rows)
        for n in range(len(table.header))
    ]
    kind = [' class="n"' if is_right and n else "" for n, is_right in enumerate(right)]
    head = "".join(cell("th", x, f' scope="col"{k}') for x, k in zip(table.header, kind))
    rows = "".join(
        "<tr>"
        + cell("th", row[0], ' scope="row"')
        + "".join(cell("td", x, k) for x, k in zip(row[1:], kind[1:]))
        + "</tr>\n"
        for row in table.rows
    )
    caption = cell("caption", table.caption) if table.caption else ""
    return (
        f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _is_number(text: str) -> bool:
    """Digits, signs, separators and a unit; ``-`` and nothing stand for a missing number."""
    return not text.strip("-–+0123456789.,% e") or (text[:1].isdigit() and " " in text)


def csv_bytes(sheet: Sheet) -> bytes:
    """The sheet as UTF-8 CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(sheet.header)
    writer.writerows(sheet.rows())
    return text.getvalue().encode()


def beside_files(sections: Sequence[Section]) -> dict[str, Callable[[], bytes]]:
    """Name of every PNG and CSV file of a report -> what makes its bytes."""
    files: dict[str, Callable[[], bytes]] = {}
    for section in sections:
        for part in section.parts:
            if isinstance(part, Picture):
                files[f"{part.name}.png"] = lambda picture=part: as_png(picture)  # type: ignore[misc]
        for sheet in section.sheets:
            files[f"{sheet.name}.csv"] = lambda sheet=sheet: csv_bytes(sheet)  # type: ignore[misc]
    return files


def write_beside(
    directory: Path, files: Mapping[str, Callable[[], bytes]], *, flag: str, overwrite: bool
) -> None:
    """Write some of `beside_files` into ``directory``, each file at once.

    Args:
        flag: that named the directory, for messages.

    Raises:
        ConfigError: it is a file, or one of the files is there and ``overwrite`` is not given.
        StorageError: it cannot be made or written.
    """
    check_directory(directory, flag)
    there = [name for name in files if (directory / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{flag} {directory}: holds {there[0]} already; choose another or use --overwrite"
        )
    try:
        directory.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{flag} {directory}: {error.strerror}") from None
    for name, make in files.items():
        replace_file(directory / name, make())


def check_directory(directory: Path, flag: str) -> None:
    """Refuse, before any work, a directory that is a file or has no place to be in."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{flag} {directory}: is a file; wanted a directory")
    if not directory.absolute().parent.is_dir():
        raise StorageError(f"{flag} {directory}: {directory.parent} does not exist; make it first")
