"""What can be held of the benchmark of 2:4 kernels without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from benchmarks.sparse_speed import (
    check_product,
    dense_bytes,
    packed_bytes,
    pruned,
    row,
)

ROOT = Path(__file__).parents[2]


def test_without_a_gpu_it_says_so_and_is_no_failure() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "sparse_speed.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("no GPU: ")
    assert "| all of 32 layers | 12952.0 | 7285.5 | 0.5625 |" in done.stdout


def test_sizes_by_formula_are_those_of_torchs_packed_form_and_nothing_is_lost_in_it() -> None:
    weight = pruned(torch.randn(64, 128).to(torch.bfloat16))
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.nbytes + places.nbytes == packed_bytes(64, 128)
    assert weight.nbytes == dense_bytes(64, 128)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)


def test_another_product_is_refused() -> None:
    wanted = torch.randn(8, 32)
    check_product(wanted.bfloat16(), wanted, "one")
    with pytest.raises(SystemExit, match="one: the product is 0.1 off"):
        check_product(1.1 * wanted, wanted, "one")
    with pytest.raises(SystemExit):
        check_product(wanted * torch.nan, wanted, "one")


def test_a_row_tells_how_much_faster_each_backend_is() -> None:
    times = {"dense": (0.05, True), "cuSPARSELt": (0.04, False)}
    assert row("q", 16, times) == "| q | 16 | 50.0 | 1.25 * | none |"
