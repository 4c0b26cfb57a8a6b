"""The recipe of domains: what it says, what it refuses; targets from it, a file, a scaling law."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_prune.data.domain_recipe import read_recipe, read_targets, target_losses
from megatron_prune.data.scaling_law import fit_scaling_law
from megatron_prune.errors import ConfigError

WEB = {"name": "web", "prefixes": ["/data/web"], "weight": 3, "target": 2.5}
CODE = {"name": "code", "prefixes": "/data/code", "weight": 1}


def _write(path: Path, domains: list[dict[str, Any]], **more: Any) -> Path:
    path.write_text(yaml.safe_dump({"domains": domains, **more}))
    return path


def test_a_recipe_is_read(tmp_path: Path) -> None:
    rows = [WEB, {**CODE, "validation": ["/data/held_out"]}]
    recipe = read_recipe(_write(tmp_path / "r.yaml", rows))
    assert recipe.weights == {"web": 0.75, "code": 0.25}
    assert [domain.prefixes for domain in recipe.domains] == [("/data/web",), ("/data/code",)]
    assert [domain.validation for domain in recipe.domains] == [(), ("/data/held_out",)]


@pytest.mark.parametrize(
    ("domains", "says"),
    [
        ([], "its list 'domains' is empty"),
        ([{"prefixes": ["x"]}], "domain 1: wanted a table with a 'name'"),
        ([WEB, WEB], "two domains are called web"),
        ([{"name": "web", "weight": 1}], "domain web: its 'prefixes' is missing"),
        ([{**WEB, "weight": 0}], "domain web: weight is 0; wanted a number above 0"),
        ([{**WEB, "weight": "much"}], "domain web: weight is 'much'"),
        ([{**WEB, "prefix": "x"}], "domain web: unknown 'prefix'"),
        ([{**WEB, "prefixes": []}], "domain web, prefixes: found []"),
        ([{**WEB, "prefixes": ["x", "x"]}], "a corpus is listed twice"),
        ([{**WEB, "scaling": []}], "has a target and points of a scaling law"),
        ([{**CODE, "scaling": [{"size": 3}]}], "domain code, scaling: wanted a list of"),
        (
            [{**CODE, "scaling": [{"parameters": n, "loss": 2.0} for n in (1e6, 2e6)]}],
            "domain code, scaling: losses of 2 model sizes; a scaling law has three unknowns",
        ),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(
    tmp_path: Path, domains: list[dict[str, Any]], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_recipe(_write(tmp_path / "r.yaml", domains))
    assert says in str(caught.value)


def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match="wanted a table with a list 'domains'"):
        read_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("{")
    with pytest.raises(ConfigError, match="not YAML"):
        read_recipe(tmp_path / "r.yaml")
    with pytest.raises(ConfigError, match="unknown 'target'"):
        read_recipe(_write(tmp_path / "r.yaml", [WEB], target=1))
    with pytest.raises(ConfigError, match="targets is {'web': 2.0}; wanted the path"):
        read_recipe(_write(tmp_path / "r.yaml", [WEB], targets={"web": 2.0}))


def test_targets_come_from_the_recipe_the_law_or_the_file(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    file.write_text(json.dumps({"domains": {"web": {"loss": 9.0}, "code": {"loss": 1.25}}}))
    points = [{"parameters": f"{n:g}", "loss": 1 + 40 * n**-0.2} for n in (1e6, 1e7, 1e8)]
    books = {"name": "books", "prefixes": ["b"], "weight": 1, "scaling": points}
    path = _write(tmp_path / "r.yaml", [WEB, CODE, books], targets=str(file))
    found = target_losses(read_recipe(path), 10**9)
    assert found == pytest.approx({"web": 2.5, "code": 1.25, "books": 1 + 40 * 1e9**-0.2})
    path = _write(tmp_path / "r.yaml", [WEB, CODE, books], targets=str(file), parameters="2e9")
    assert target_losses(read_recipe(path), 10**9)["books"] == pytest.approx(1 + 40 * 2e9**-0.2)
    file.write_text(json.dumps({"code": 1.5}))
    assert read_targets(file) == {"code": 1.5}


def test_a_domain_without_a_target_is_named(tmp_path: Path) -> None:
    recipe = read_recipe(_write(tmp_path / "r.yaml", [WEB, CODE]))
    with pytest.raises(ConfigError, match="domain code has no target loss; give target, scaling"):
        target_losses(recipe, 10)
    (tmp_path / "t.json").write_text(json.dumps({"web": None}))
    with pytest.raises(ConfigError, match="loss of web is None; wanted a number above 0"):
        read_targets(tmp_path / "t.json")


@pytest.mark.parametrize(
    ("law", "sizes"),
    [
        ((1.69, 406.4, 0.34), (1e7, 1e8, 1e9)),  # Hoffmann et al., 2022
        ((0.0, 9.0, 0.05), (1e6, 3e6, 2e7, 5e8)),
        ((1.2, 30.0, 0.9), (160e6, 410e6, 1.4e9, 2.8e9)),
    ],
)
def test_a_law_is_found_again_from_its_points(
    law: tuple[float, float, float], sizes: tuple[float, ...]
) -> None:
    def loss(n: float) -> float:
        return law[0] + law[1] * n ** -law[2]

    found = fit_scaling_law([(n, loss(n)) for n in sizes], "domain web")
    assert found.exponent == pytest.approx(law[2], rel=1e-3)
    for n in (*sizes, 7e9):
        assert found.loss(n) == pytest.approx(loss(n), rel=1e-4)


def test_no_other_law_is_closer_to_noisy_points() -> None:
    rng = np.random.default_rng(0)
    sizes = np.array([1e6, 3e6, 1e7, 3e7, 1e8, 3e8])
    losses = 1.5 + 50 * sizes**-0.25 + rng.normal(0, 0.02, 6)
    law = fit_scaling_law(list(zip(sizes, losses)), "domain web")

    def error(irreducible: float, factor: float, exponent: float) -> float:
        found = irreducible + factor * (sizes / law.reference) ** -exponent
        return float(((found - losses) ** 2).sum())

    best = (law.irreducible, law.factor, law.exponent)
    least = error(*best)
    for _ in range(2000):
        nearby = [x * (1 + rng.normal(0, 10.0 ** -rng.integers(1, 5))) for x in best]
        assert error(*nearby) >= least - 1e-15


def test_losses_that_rise_with_size_are_refused() -> None:
    with pytest.raises(ConfigError, match="domain web: the losses do not fall as models grow"):
        fit_scaling_law([(1e6, 2.0), (1e7, 2.1), (1e8, 2.2)], "domain web")
    with pytest.raises(ConfigError, match="domain web: parameters 1e\\+07, loss -1"):
        fit_scaling_law([(1e6, 2.0), (1e7, -1.0), (1e8, 2.2)], "domain web")
    with pytest.raises(ConfigError, match="losses of 2 model sizes"):
        fit_scaling_law([(1e6, 2.0), (1e6, 2.1), (1e8, 1.2)], "domain web")
