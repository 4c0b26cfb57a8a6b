"""The recipe of ``--domains``: which domains there are, and what loss each should reach.

```yaml
targets: targets.json      # of `evaluate --per-domain --save`, or JSON of {name: loss}
domains:
  - name: web
    prefixes: [/data/web_text_document]     # of preprocess, without .bin
    weight: 0.7                             # at the start; any positive numbers
    validation: [/data/web_held_out_text_document]   # default: the part that --split gives
    target: 2.31                            # wins over the file
  - name: code
    prefixes: [/data/code_text_document]
    weight: 0.3
    scaling:                                # or: predicted from losses of smaller models
      - {parameters: 160e6, loss: 1.92}
      - {parameters: 410e6, loss: 1.71}
      - {parameters: 1.4e9, loss: 1.52}
parameters: 2.7e9          # where the law is read off; default: the size of the trained model
```

Paths count from the working directory, as in flags.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_prune.data.domains import shares
from megatron_prune.data.scaling_law import fit_scaling_law
from megatron_prune.errors import ConfigError
from megatron_prune.parsing import read_json, read_yaml

_KEYS = {"domains", "targets", "parameters"}
_DOMAIN_KEYS = {"name", "prefixes", "weight", "validation", "target", "scaling"}


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text.

    Attributes:
        weight: its share at the start; those of all domains sum to 1.
        validation: corpora that are all validation; empty: the part that ``--split`` gives.
        scaling: (parameters, loss) of other models.
    """

    name: str
    prefixes: tuple[str, ...]
    weight: float
    validation: tuple[str, ...] = ()
    target: float | None = None
    scaling: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class DomainRecipe:
    """The domains, in their order."""

    path: str
    domains: tuple[Domain, ...]
    targets: str | None = None
    parameters: float | None = None

    @property
    def weights(self) -> dict[str, float]:
        return {domain.name: domain.weight for domain in self.domains}


def read_recipe(path: Path) -> DomainRecipe:
    """Read a recipe; no corpus is opened.

    Raises:
        ConfigError: missing, not YAML, or an entry that is missing, unknown or not usable.
    """
    found = read_yaml(path, ConfigError, flag="--domains")
    if not isinstance(found, dict) or not isinstance(found.get("domains"), list):
        raise ConfigError(f"--domains {path}: wanted a table with a list 'domains'")
    _refuse_unknown(f"--domains {path}", found, _KEYS)
    if not found["domains"]:
        raise ConfigError(f"--domains {path}: its list 'domains' is empty; give two or more")
    domains = [_domain(path, number, row) for number, row in enumerate(found["domains"], 1)]
    names = [domain.name for domain in domains]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--domains {path}: two domains are called {twice[0]}; rename one")
    weights = shares([domain.weight for domain in domains])
    targets, parameters = found.get("targets"), found.get("parameters")
    if not isinstance(targets, str | None):
        raise ConfigError(
            f"--domains {path}: targets is {targets!r}; wanted the path of a JSON file, or give "
            "each domain its target"
        )
    return DomainRecipe(
        path=str(path),
        domains=tuple(_with_weight(d, weight) for d, weight in zip(domains, weights)),
        targets=targets,
        parameters=None
        if parameters is None
        else _positive(f"--domains {path}: parameters", parameters),
    )


def _with_weight(domain: Domain, weight: float) -> Domain:
    return Domain(**{**vars(domain), "weight": weight})


def _refuse_unknown(where: str, table: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(map(str, set(table) - known))
    if unknown:
        raise ConfigError(f"{where}: unknown {unknown[0]!r}; wanted {', '.join(sorted(known))}")


def _positive(where: str, value: Any) -> float:
    """YAML takes 1e9 for a string; so numbers may be strings here."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or not (math.isfinite(number) and number > 0):
        raise ConfigError(f"{where} is {value!r:.60}; wanted a number above 0")
    return number


def _prefixes(where: str, value: Any) -> tuple[str, ...]:
    rows = [value] if isinstance(value, str) else value
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) for row in rows):
        raise ConfigError(f"{where}: found {value!r}; wanted a list of corpora, without .bin")
    if len(set(rows)) < len(rows):
        raise ConfigError(f"{where}: a corpus is listed twice; list it once")
    return tuple(rows)


def _domain(path: Path, number: int, row: Any) -> Domain:
    where = f"--domains {path}: domain {number}"
    if not isinstance(row, dict) or not isinstance(row.get("name"), str) or not row["name"].strip():
        raise ConfigError(f"{where}: wanted a table with a 'name'")
    name = row["name"]
    where = f"--domains {path}: domain {name}"
    _refuse_unknown(where, row, _DOMAIN_KEYS)
    for key in ("prefixes", "weight"):
        if key not in row:
            raise ConfigError(f"{where}: its {key!r} is missing")
    if "target" in row and "scaling" in row:
        raise ConfigError(f"{where}: has a target and points of a scaling law; give one of them")
    return Domain(
        name=name,
        prefixes=_prefixes(f"{where}, prefixes", row["prefixes"]),
        weight=_positive(f"{where}: weight", row["weight"]),
        validation=_prefixes(f"{where}, validation", row["validation"])
        if row.get("validation")
        else (),
        target=_positive(f"{where}: target", row["target"]) if "target" in row else None,
        scaling=_points(where, row["scaling"]) if "scaling" in row else (),
    )


def _points(where: str, rows: Any) -> tuple[tuple[float, float], ...]:
    wanted = {"parameters", "loss"}
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and set(r) == wanted for r in rows
    ):
        raise ConfigError(f"{where}, scaling: wanted a list of {{parameters: N, loss: L}}")
    points = tuple(
        (
            _positive(f"{where}, scaling: parameters", row["parameters"]),
            _positive(f"{where}, scaling: loss", row["loss"]),
        )
        for row in rows
    )
    fit_scaling_law(points, f"{where}, scaling")  # refused here, before anything else is done
    return points


def read_targets(path: Path) -> dict[str, float]:
    """Losses by domain: a file of ``evaluate --per-domain --save``, or a plain table.

    Raises:
        ConfigError: missing, or not such a file.
    """
    found = read_json(path, ConfigError, flag="targets")
    table = found.get("domains", found) if isinstance(found, dict) else None
    if not isinstance(table, dict):
        raise ConfigError(f"targets {path}: wanted a table of domains and their losses")
    return {
        str(name): _positive(
            f"targets {path}: loss of {name}", row.get("loss") if isinstance(row, dict) else row
        )
        for name, row in table.items()
    }


def other_windows(recipe: DomainRecipe, now: Mapping[str, Any]) -> str | None:
    """What the file's losses were measured with, where that is not what is so ``now``.

    Args:
        now: of the training: ``seq_length``, ``split`` and ``seed``, by which windows are cut.

    Returns:
        A sentence; None where they agree or the file does not tell.
    """
    if recipe.targets is None:
        return None
    read_targets(Path(recipe.targets))  # it is one
    saved = read_json(Path(recipe.targets), ConfigError, flag="targets")
    far = [
        f"{key} {saved[key]}, now {now[key]}" for key in now if saved.get(key, now[key]) != now[key]
    ]
    if not far:
        return None
    return (
        f"targets {recipe.targets}: measured on other windows than this training's "
        f"({'; '.join(far)}): losses and targets differ by that, too"
    )


def target_losses(recipe: DomainRecipe, parameters: int) -> dict[str, float]:
    """The loss each domain should reach: its own, predicted, or from the file.

    Args:
        parameters: of the model in training.

    Raises:
        ConfigError: a domain without one.
    """
    listed = {} if recipe.targets is None else read_targets(Path(recipe.targets))
    found: dict[str, float] = {}
    for domain in recipe.domains:
        if domain.target is not None:
            found[domain.name] = domain.target
        elif domain.scaling:
            law = fit_scaling_law(domain.scaling, f"domain {domain.name}")
            found[domain.name] = law.loss(recipe.parameters or parameters)
        elif domain.name in listed:
            found[domain.name] = listed[domain.name]
        else:
            where = f", and {recipe.targets} has none" if recipe.targets else ""
            raise ConfigError(
                f"--domains {recipe.path}: domain {domain.name} has no target loss{where}; give "
                "target, scaling or a file of `evaluate --domains --per-domain --save`, or "
                "--domain-weighting constant"
            )
    return found
