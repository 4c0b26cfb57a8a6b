#!/usr/bin/env python3
"""Print the table at the end of the walk, from the files it left behind.

    python tools/walk_table.py RUN_DIR NAME:STEP[+STEP...] ...

A row for each NAME: ``RUN_DIR/report/NAME.inspect.json`` and ``NAME.evaluate.json`` (what
``megatron-prune inspect --json`` and ``evaluate --json`` write), and the seconds of the steps
that made it. Markdown, so that it can be pasted into a README as it is.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
COLUMNS = (
    "model",
    "parameters",
    "of source",
    "bytes",
    "loss",
    "perplexity",
    "bits per byte",
    "made in (s)",
)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(
            f"walk_table: error: {path} is missing; the walk has not come that far"
        ) from None


def row(run: Path, name: str, steps: list[str]) -> dict[str, Any]:
    """The facts of one model of the walk."""
    found = read_json(run / "report" / f"{name}.inspect.json")
    judged = read_json(run / "report" / f"{name}.evaluate.json")
    return {
        "model": name,
        "parameters": found["parameters"],
        "bytes": found["parameters"] * ITEM_BYTES[found["dtype"]],
        "loss": judged["loss"],
        "perplexity": judged["perplexity"],
        "bits per byte": judged["bits_per_byte"],
        "seconds": sum(int((run / ".steps" / f"{step}.seconds").read_text()) for step in steps),
        "tokens": judged["tokens"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with the columns lined up."""
    cells = [list(COLUMNS)]
    for facts in rows:
        cells.append(
            [
                facts["model"],
                f"{facts['parameters']:,}",
                f"{facts['parameters'] / rows[0]['parameters']:.0%}",
                f"{facts['bytes'] / 1e6:,.0f} MB",
                f"{facts['loss']:.3f}",
                f"{facts['perplexity']:,.1f}",
                f"{facts['bits per byte']:.3f}",
                f"{facts['seconds']}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells)]

    def line(row: list[str]) -> str:
        first, *numbers = (
            text.rjust(width) if place else text.ljust(width)
            for place, (text, width) in enumerate(zip(row, widths))
        )
        return "| " + " | ".join([first, *numbers]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("rows", nargs="+", metavar="NAME:STEP[+STEP]", help="first one: the source")
    args = parser.parse_args()
    rows = []
    for text in args.rows:
        name, _, steps = text.partition(":")
        rows.append(row(args.run, name, steps.split("+")))
    print(table(rows))
    print(f"\nJudged on {rows[0]['tokens']:,} held-out tokens.")


if __name__ == "__main__":
    main()
