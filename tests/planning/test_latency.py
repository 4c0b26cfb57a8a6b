"""The line through measured layers, and files that are no tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_prune.errors import DamagedError, PlanError, PruneError
from megatron_prune.planning.latency import (
    LatencyTable,
    LayerTime,
    OutputTime,
    fit_latency,
    load_latency_table,
)

TOKENS, WIDTH, SEQ = 2 * 32, 8, 32


def seconds_of(hidden: int, heads: int, groups: int, ffn: int) -> float:
    """A machine that does 1 GFLOP/s in FFN, half of that in the rest, and starts in 10 us."""
    projections = 2 * TOKENS * hidden * WIDTH * 2 * (heads + groups)
    attention = 2 * TOKENS * heads * WIDTH * SEQ
    return 1e-5 + (2 * projections + 2 * attention + 6 * TOKENS * hidden * ffn) / 1e9


SIZES = [
    (hidden, heads, 2, ffn) for hidden in (32, 48, 64) for heads in (4, 8) for ffn in (64, 128)
]
TABLE = LatencyTable(
    device="made up",
    threads=1,
    dtype="fp32",
    seq_length=SEQ,
    batch_size=2,
    tensor_parallel=1,
    kv_channels=WIDTH,
    layers=tuple(
        LayerTime(hidden=d, heads=q, groups=k, ffn=f, seconds=seconds_of(d, q, k, f))
        for d, q, k, f in SIZES
    ),
    outputs=tuple(
        OutputTime(hidden=d, vocab=100, seconds=1e-6 + 2 * TOKENS * d * 100 / 1e9) for d in (32, 64)
    ),
)


def test_a_machine_that_is_a_line_is_found() -> None:
    model = fit_latency(TABLE)
    assert model.worst_error < 1e-9
    sizes = {"L": 3, "D": 40, "Q": 6, "K": 2, "F": 100, "V": 100}
    wanted = 3 * seconds_of(40, 6, 2, 100) + 1e-6 + 2 * TOKENS * 40 * 100 / 1e9
    assert model.seconds_at(sizes) == pytest.approx(wanted, rel=1e-6)
    arrays = {axis: np.array([n, n]) for axis, n in sizes.items()}
    assert model.seconds_at(arrays).tolist() == pytest.approx([wanted, wanted], rel=1e-6)


def test_a_larger_shape_is_never_faster_whatever_the_noise() -> None:
    """Plain least squares gives negative coefficients on these: the control."""
    noise = np.random.default_rng(1).uniform(0.5, 1.5, len(SIZES))
    rows = [replace(row, seconds=row.seconds * x) for row, x in zip(TABLE.layers, noise)]
    model = fit_latency(replace(TABLE, layers=tuple(rows)))
    assert min(*model.layer, *model.output) >= 0 and model.worst_error > 0.05
    seconds = np.array([row.seconds for row in rows])
    plain = np.linalg.lstsq(
        np.array([[1, d, d * (q + k), d * f, q] for d, q, k, f in SIZES]) / seconds[:, None],
        np.ones(len(rows)),
        rcond=None,
    )[0]
    assert plain.min() < 0


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(TABLE.to_json())
    assert load_latency_table(tmp_path / "t.json") == TABLE


def _changed(**changes: object) -> str:
    return json.dumps({**json.loads(TABLE.to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        (None, PlanError, "make it with `megatron-prune profile`"),
        ("{", DamagedError, "not JSON"),
        ("[]", PlanError, "other JSON; wanted a table of `profile`"),
        (_changed(version=2), DamagedError, "another version than 1"),
        (_changed(layers=[]), DamagedError, "wanted layers and outputs"),
        (_changed(tensor_parallel="1"), DamagedError, "tensor_parallel is '1'; wanted a whole"),
        (_changed(seq_length=0), DamagedError, "seq_length is 0; wanted a whole number above 0"),
        (_changed(batch_size=True), DamagedError, "batch_size is True; wanted a whole number"),
        (_changed(kv_channels=10**400), DamagedError, "wanted a whole number above 0"),
        (_changed(device=[1]), DamagedError, "device is [1]; wanted text"),
        ("[" * 100_000, DamagedError, "not JSON"),
        ('{"version": 1, "kept": {}}', PlanError, "other JSON; wanted a table of `profile`"),
        ("PAR1", PlanError, "is a Parquet file; wanted a table of `profile`"),
        (
            _changed(outputs=[{"hidden": 1.5, "vocab": 1, "seconds": 1.0}]),
            DamagedError,
            "hidden is 1.5; wanted a whole number above 0",
        ),
        (
            _changed(outputs=[{"hidden": 1, "vocab": 1, "seconds": "1"}]),
            DamagedError,
            "seconds is '1'; wanted seconds above 0",
        ),
        (
            _changed(outputs=[{"hidden": 1, "vocab": 1, "seconds": float("nan")}]),
            DamagedError,
            "seconds is nan; wanted seconds above 0",
        ),
        (_changed(layers=[{"hidden": 1}]), DamagedError, "missing 4 required"),
        (_changed(more=1), DamagedError, "unexpected keyword argument 'more'"),
        (
            _changed(outputs=[{"hidden": 1, "vocab": 1, "seconds": -1.0}]),
            DamagedError,
            "seconds above 0",
        ),
    ],
)
def test_what_is_no_table_is_refused(
    text: str | None, error: type[PruneError], says: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error) as caught:
        load_latency_table(path)
    assert str(caught.value).startswith(f"--latency-table {path}: ") and says in str(caught.value)
