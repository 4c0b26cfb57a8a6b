"""A recipe is the flags of a stage, written as YAML: ``hidden-size-remain: 3072``.

Recipes become arguments in front of those on the command line, so argparse checks both alike and
the command line wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_prune.errors import ConfigError
from megatron_prune.files.parsing import read_yaml


def with_dashes(argv: Sequence[str]) -> list[str]:
    """``--hidden_size_remain=8`` -> ``--hidden-size-remain=8``; values are left alone."""
    out = []
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            word = flag.replace("_", "-") + equals + value
        out.append(word)
    return out


def _as_arguments(path: Path, key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    if value is True:
        return [flag]
    if value is None or value is False or value == []:
        return []
    if isinstance(value, dict):
        raise ConfigError(f"{path}: {key} is a table; wanted a number, a string or a list")
    if isinstance(value, list):
        if flag in ("--drop-layers", "--pattern-layers"):
            return [flag, ",".join(map(str, value))]
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def expand_recipe(stage: str, argv: Sequence[str]) -> list[str]:
    """``argv`` with the recipe of ``--config`` put in front of it.

    The file holds either the flags themselves or one table per stage, so that one recipe can
    describe a whole walk.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a table.
    """
    argv = list(argv)
    places = [
        i for i, word in enumerate(argv) if word == "--config" or word.startswith("--config=")
    ]
    if not places:
        return argv
    at = places[-1]
    if "=" not in argv[at] and at + 1 == len(argv):
        return argv  # argparse says what is missing
    path = Path(argv[at].partition("=")[2] if "=" in argv[at] else argv[at + 1])
    recipe = read_yaml(path, ConfigError, flag="--config")
    if not isinstance(recipe, dict):
        raise ConfigError(
            f"--config {path}: wanted a table of flags, found {type(recipe).__name__}"
        )
    if isinstance(recipe.get(stage), dict):
        recipe = recipe[stage]
    return [
        word for key, value in recipe.items() for word in _as_arguments(path, str(key), value)
    ] + argv
