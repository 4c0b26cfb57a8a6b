"""The distillation loss in place, on vocabulary shards, is plain torch's, value and gradient."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.divergences import errors
from tests.engine.on_ranks import Job, launch
from tests.launch import made_once

SETTINGS: dict[str, dict[str, Any]] = {
    "kl": {},
    "lm": {"lm_weight": 0.3},
    "lm-alone": {"lm_weight": 1.0},
    "warm": {"temperature": 2.5, "lm_weight": 0.3},
    "cold": {"temperature": 0.5, "lm_weight": 0.3},
    "top-1": {"top_k": 1},
    "top-5": {"top_k": 5, "temperature": 2.0, "lm_weight": 0.3},
    "top-50": {"top_k": 50},  # more than one of three shards has
    "top-all": {"top_k": 97},
    "two": {"weights": (0.7, 0.3), "temperature": 2.0},
    "two-top-5": {"weights": (0.7, 0.3), "top_k": 5},
}
TOLERANCES = {"float64": 1e-11, "float32": 2e-5}  # float32: of losses up to 20


def _check(far: Any, dtype: str) -> None:
    assert isinstance(far, dict), far
    assert far.pop("size") > 0.1
    tolerance = TOLERANCES[dtype]
    assert far.pop("gradient") < tolerance
    assert max(far.values()) < tolerance, far


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_torchs(name: str, dtype: str) -> None:
    _check(errors(tp=1, dtype=dtype, **SETTINGS[name]), dtype)


@pytest.mark.parametrize("name", ["warm", "top-5", "two"])
def test_blocks_of_one_row_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_prune.engine.objectives import divergence

    monkeypatch.setattr(divergence, "_BLOCK_BYTES", {"cpu": 1})
    _check(errors(tp=1, dtype="float64", **SETTINGS[name]), "float64")


ON_RANKS = list(product(SETTINGS, (2, 3), TOLERANCES))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str], list[Any]]:
    with made_once(tmp_path_factory, "divergences") as (folder, fresh):
        if fresh:
            jobs = [
                Job(check="divergence", world=tp, given={"tp": tp, "dtype": d, **SETTINGS[name]})
                for name, tp, d in ON_RANKS
            ]
            torch.save(launch(jobs, Path(folder), ranks=3), folder / "found.pt")
    return dict(zip(ON_RANKS, torch.load(folder / "found.pt")))


@pytest.mark.parametrize("key", ON_RANKS, ids=lambda key: "-".join(map(str, key)))
def test_shards_give_the_same(found: dict[Any, list[Any]], key: tuple[str, int, str]) -> None:
    for far in found[key]:
        _check(far, key[2])


def test_tokens_as_likely_as_the_last_of_the_k_are_kept_too() -> None:
    """Of 5 tokens one is ahead and two share the second place: k = 2 is k = 3."""
    from megatron_prune.engine.groups import model_parallel
    from megatron_prune.engine.objectives.divergence import Softening, distillation_losses
    from megatron_prune.model.grid import ParallelGrid

    teacher = torch.tensor([[[1.0, 3.0, 2.0, 0.0, 2.0]]])
    student = torch.tensor([[[0.5, -1.0, 2.0, 1.0, 0.0]]])
    found = []
    with model_parallel(ParallelGrid()) as groups:
        for k in (1, 2, 3, 4):
            _, _, kl = distillation_losses(
                student.clone(), [teacher.clone()], torch.zeros(1, 1, dtype=torch.int64),
                vocab_size=5, how=Softening(top_k=k), group=groups.tp_group,
            )  # fmt: skip
            found.append(float(kl))
    assert found[0] < found[1] == found[2] < found[3]


def test_bf16_is_bf16s_rounding_away() -> None:
    far = errors(tp=1, dtype="bfloat16", lm_weight=0.3, temperature=2.0)
    assert far["loss"] < 1e-4 and far["gradient"] < 4e-3 * far["size"]
