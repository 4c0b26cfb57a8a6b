#!/usr/bin/env python3
"""Write the default corpus, which ships with every Python: two domains, each with held-out text.

    python tools/make_default_corpus.py [--save DIR] [--code-bytes N]

``prose``  the reference manual in ``pydoc_data.topics``: English, about 0.45 MB, a document a topic
``code``   the standard library's sources, a document a module; ``--code-bytes`` takes an even
           selection of modules of about that size (0: all, about 12 MB)

For each domain: ``NAME.train.jsonl`` (``{"text": ...}`` a line) for ``megatron-prune preprocess``
and ``NAME.eval.txt`` for ``megatron-prune evaluate``; ``eval.txt``, equal parts of both held-out
texts; and ``calibration.jsonl``, training documents of both by turns, for ``megatron-prune score``
and ``prune --repair``.

Every tenth document is held out, so that the held-out text is like the rest (the manual is in
alphabetical order, the last tenth is about types). The manual repeats whole paragraphs in several
topics: a training document loses every paragraph that the held-out text has too. The same
Python gives the same bytes. Prints the files on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from megatron_prune.files import replace_file

REPO = Path(__file__).resolve().parent.parent
DEFAULT = REPO / "runs" / "corpus"
EVERY = 10  # one document in ten is held out
CALIBRATION = 4000  # characters of a document: a thousand tokens, so that a few see many documents
NOT_CORPUS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def prose() -> list[str]:
    """The topics of Python's manual, in alphabetical order, repeated texts once."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(topics[name].strip() for name in sorted(topics)))


def code(limit_bytes: int) -> list[str]:
    """Modules of the standard library in alphabetical order, evenly thinned out to a size."""
    library = Path(os.__file__).resolve().parent
    files = sorted(
        file
        for file in library.rglob("*.py")
        if not NOT_CORPUS & set(file.relative_to(library).parts)
        and 1_000 <= file.stat().st_size <= 200_000  # no empty __init__, no tables of data
    )
    total = sum(file.stat().st_size for file in files)
    step = max(1, round(total / limit_bytes)) if limit_bytes else 1
    return [file.read_text(encoding="utf-8", errors="ignore").strip() for file in files[::step]]


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out documents that share no paragraph of more than a line or so."""
    held_out = documents[EVERY - 1 :: EVERY]
    known = {part.strip() for text in held_out for part in text.split("\n\n")}
    known = {part for part in known if len(part) >= 60}
    training = []
    for number, text in enumerate(documents):
        if number % EVERY != EVERY - 1:
            parts = [part for part in text.split("\n\n") if part.strip() not in known]
            training.append("\n\n".join(parts).strip())
    return [text for text in training if text], held_out


def write(path: Path, chunks: Iterable[str]) -> None:
    """The whole file or none of it."""
    replace_file(path, "".join(chunks).encode())
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", type=Path, default=DEFAULT, help="a directory")
    parser.add_argument("--code-bytes", type=int, default=1_500_000, help="0: all of it")
    args = parser.parse_args()
    if args.code_bytes < 0:
        parser.error(f"--code-bytes {args.code_bytes}: wanted 0 (all) or a number of bytes")

    args.save.mkdir(parents=True, exist_ok=True)
    all_held_out, all_training = [], []
    for name, documents in {"prose": prose(), "code": code(args.code_bytes)}.items():
        training, held_out = split(documents)
        text = "\n\n".join(held_out) + "\n"
        all_held_out.append(text)
        all_training.append(training)
        write(args.save / f"{name}.train.jsonl", (json.dumps({"text": t}) + "\n" for t in training))
        write(args.save / f"{name}.eval.txt", [text])
        print(
            f"{name}: {len(training)} documents, {sum(map(len, training)):,} characters to train "
            f"on; {len(held_out)} documents, {len(text):,} characters held out",
            file=sys.stderr,
        )
    by_turns = (text[:CALIBRATION] for pair in zip(*all_training) for text in pair)
    write(args.save / "calibration.jsonl", (json.dumps({"text": t}) + "\n" for t in by_turns))
    shortest = min(map(len, all_held_out))
    write(
        args.save / "eval.txt",
        (text[:shortest].rpartition("\n")[0] + "\n" for text in all_held_out),
    )


if __name__ == "__main__":
    main()
