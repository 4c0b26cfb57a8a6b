"""Pico models scored once by everything there is, each beside transformers' model of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.criteria import loops
from tests.pico import TEXT, ok


@pytest.fixture(scope="session")
def scored(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], loops.Scored]:
    """Kind -> what `score` says of it, alone in this process."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    root, made = tmp_path_factory.mktemp("scored"), {}
    text = " ".join(random.Random(0).choices([*TEXT.split(), *"abcdefghijklmnop"], k=400))
    (root / "text").write_text(text)

    def score(kind: str) -> loops.Scored:
        if kind in made:
            return made[kind]
        ok(
            "score", "--load", models(kind), "--data", root / "text", "--save", root / kind,
            "--num-samples", loops.SAMPLES, "--seq-length", loops.SEQ, "--micro-batch-size", 2,
            "--removal-samples", loops.REMOVAL_SAMPLES, "--removal-layers", loops.REMOVAL_LAYERS,
            "--criterion", ",".join(loops.CRITERIA),
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(models(kind))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        made[kind] = loops.Scored(
            scores=load_file(root / kind),
            model=AutoModelForCausalLM.from_pretrained(models(kind), dtype=torch.float32).eval(),
            ids_WS=torch.tensor(ids[: loops.SAMPLES * loops.SEQ]).view(loops.SAMPLES, loops.SEQ),
        )
        return made[kind]

    return score
