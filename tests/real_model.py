"""Tests on SmolLM2-135M-Instruct: where it lies, and the marks of a module that needs it."""

from __future__ import annotations

from pathlib import Path

import pytest

MODEL = Path(__file__).parents[1] / "runs/models/SmolLM2-135M-Instruct"
MARKS = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(
        not (MODEL / "config.json").is_file(),
        reason=f"{MODEL.name} is not there; run python tools/get_default_model.py",
    ),
]
