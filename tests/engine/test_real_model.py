"""Law 5 on a real model: SmolLM2-135M-Instruct, where ``tools/get_default_model.py`` has put it.

bash scripts/test.sh -m real_model tests/engine/test_real_model.py
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.on_ranks import Job, launch
from tests.real_model import MARKS, MODEL

LAYOUTS: dict[str, tuple[dict[str, int], int]] = {
    "TP=1": ({}, 1),
    "TP=3": ({"tensor_parallel": 3}, 3),
    "PP=2": ({"pipeline_parallel": 2}, 2),
}
TEXT = "Pruning removes what a model can do without; what is left has to be trained back."

pytestmark = MARKS


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Transformers' logits, and those of every rank that has them, by layout."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("real-model")
    ids = torch.tensor([AutoTokenizer.from_pretrained(MODEL)(TEXT).input_ids])
    torch.save(ids, folder / "ids.pt")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        found: dict[str, Any] = {"transformers": model(ids).logits}
    del model
    for name, (layout, world) in LAYOUTS.items():
        given = {"load": str(MODEL), "ids": str(folder / "ids.pt"), "layout": layout}
        job = Job(check="logits", world=world, given=given)
        found[name] = launch([job], folder / name, ranks=world)[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_of_smollm2_equal_transformers(layout: str, logits: dict[str, Any]) -> None:
    wanted = logits["transformers"]
    results = logits[layout]
    assert not any(isinstance(result, str) for result in results), results
    results = [result for result in results if result is not None]
    assert results
    for result in results:
        difference = (result[..., : wanted.shape[-1]] - wanted).abs().max().item()
        print(f"{layout}: largest difference {difference:.2e} of {wanted.abs().max():.1f}")
        assert difference < 1e-3
