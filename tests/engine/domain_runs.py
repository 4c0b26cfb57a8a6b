"""Corpora of three pico domains, and `train --domains` of them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.engine.runs import SHORT, rows
from tests.pico import TEXT, ok

WEIGHTS = {"easy": 2.0, "mixed": 1.0, "small": 1.0}
TARGETS = {"easy": 5.0, "mixed": 5.0, "small": 5.9}


def make_corpora(folder: Path, tokenizer: Path) -> None:
    """``easy`` repeats two words; ``mixed`` is in two corpora; ``small`` is soon exhausted."""
    words, rng = TEXT.split(), random.Random(0)
    texts = {
        "easy": ["fox dog " * 30] * 40,
        "mixed_1": [" ".join(rng.choices(words, k=60)) for _ in range(30)],
        "mixed_2": [" ".join(rng.choices(words, k=60)) for _ in range(20)],
        "small": [" ".join(rng.choices(words[:6], k=40)) for _ in range(5)],
        "held": [" ".join(rng.choices(words[:6], k=300))],
        "single": ["jumps over"],
    }
    for name, lines in texts.items():
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
        ok(
            "preprocess", "--input", path, "--json-key", "text", "--tokenizer-model", tokenizer,
            "--output-prefix", folder / name, "--append-eod",
        )  # fmt: skip


def prefix(folder: Path, name: str) -> str:
    return str(folder / f"{name}_text_document")


def domain_rows(folder: Path) -> list[dict[str, Any]]:
    held = {"validation": [prefix(folder, "held")]}
    corpora = {"easy": ["easy"], "mixed": ["mixed_1", "mixed_2"], "small": ["small"]}
    return [
        {
            "name": name,
            "prefixes": [prefix(folder, corpus) for corpus in corpora[name]],
            "weight": WEIGHTS[name],
            "target": TARGETS[name],
            **(held if name == "small" else {}),
        }
        for name in corpora
    ]


def write_recipe(path: Path, domains: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"domains": domains, **more}))
    return path


def words(load: object, save: object, recipe: object, *more: object) -> list[str]:
    """``train`` of a pico model with an update every second step; later flags win."""
    start = ["--load", str(load), "--save", str(save), "--domains", str(recipe)]
    return ["train", *start, *SHORT, "--domain-update-interval", "2", *map(str, more)]


def tables(save: Path) -> dict[int, dict[str, dict[str, float]]]:
    """Iteration -> what the metrics tell of each domain then."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    for row in rows(save):
        for key, value in row.items():
            if key.startswith("domain "):
                what, name = key.removeprefix("domain ").split("/")
                found.setdefault(row["iteration"], {}).setdefault(name, {})[what] = value
    return found
