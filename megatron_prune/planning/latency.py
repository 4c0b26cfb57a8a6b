"""How long a forward takes on a machine, from a table of measured layers.

`engine.profile` measures some layers and output layers of one machine at one sequence length, batch
size, dtype and tensor-parallel size; a linear model is fitted to them and answers for every shape
in between. The time of a shape is ``layers x layer + output``, of a whole forward of
batch_size x seq_length tokens (prefill, logits of every position). Decoding token by token is bound
by memory, not by these products: `budget.serving_bytes` is the better guide for it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.errors import DamagedError, PlanError
from megatron_prune.files.contents import foreign_text
from megatron_prune.files.parsing import checked_as, read_json
from megatron_prune.model.costs import Sizes
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """One measured layer: its sizes and the median seconds of its forward."""

    hidden: int
    heads: int
    groups: int
    ffn: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class OutputTime:
    """One measured output layer (final norm not included)."""

    hidden: int
    vocab: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What was measured, and of what.

    Attributes:
        device: of the machine, for the reader.
        threads: of the process on a CPU.
    """

    device: str
    threads: int
    dtype: str
    seq_length: int
    batch_size: int
    tensor_parallel: int
    kv_channels: int
    layers: tuple[LayerTime, ...]
    outputs: tuple[OutputTime, ...]

    @property
    def tokens(self) -> int:
        """Tokens of one forward."""
        return self.batch_size * self.seq_length

    def to_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"


def load_latency_table(path: Path) -> LatencyTable:
    """Read what ``profile`` saved.

    Raises:
        PlanError: missing, or another kind of file.
        DamagedError: a latency table that cannot be read, or without measurements.
    """
    if not path.is_file():
        raise PlanError(
            f"--latency-table {path}: is not there; make it with `megatron-prune profile`"
        )
    if what := foreign_text(path):
        raise PlanError(f"--latency-table {path}: {what}; wanted a table of `profile`")
    values = read_json(path, DamagedError, flag="--latency-table")
    if not isinstance(values, dict) or not {"layers", "outputs"} & values.keys():
        raise PlanError(f"--latency-table {path}: other JSON; wanted a table of `profile`")
    names = ", ".join(field.name for field in fields(LatencyTable))
    advice = f"; wanted version, {names}; measure again with `megatron-prune profile`"
    with checked_as(DamagedError, f"--latency-table {path}", "not a latency table", advice):
        if values.pop("version") != VERSION:
            raise ValueError(f"another version than {VERSION}")
        values["layers"] = tuple(LayerTime(**row) for row in values["layers"])
        values["outputs"] = tuple(OutputTime(**row) for row in values["outputs"])
        table = LatencyTable(**values)
        parts: list[Any] = [table, *table.layers, *table.outputs]
        for part in parts:
            _check_fields(part)
        if not table.layers or not table.outputs:
            raise ValueError("wanted layers and outputs")
    return table


def _check_fields(part: Any) -> None:
    """Whole numbers, seconds and words in a table, or a row of it; else raises ValueError."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.type == "int":
            known, wanted = type(value) is int and 0 < value < 2**53, "a whole number above 0"
        elif field.type == "float":
            known = type(value) in (int, float) and 0 < value < 1e9
            wanted = "seconds above 0"
        else:
            known, wanted = isinstance(value, str | tuple), "text"
        if not known:
            raise ValueError(f"{field.name} is {value!r:.60}; wanted {wanted}")


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """The fitted line: seconds = sum of coefficient x feature, every coefficient 0 or more.

    Attributes:
        layer: [5] seconds per unit of each of `_layer_features`.
        output: [2] likewise of a constant and of the output layer's products.
        worst_error: largest relative error over the table's own layers.
    """

    table: LatencyTable
    layer: tuple[float, ...]
    output: tuple[float, ...]
    worst_error: float

    def seconds_at(self, sizes: Sizes) -> Any:
        """Seconds of a forward in these sizes, L layers and the output; monotone in each size."""
        table = self.table
        features = _layer_features(table, sizes["D"], sizes["Q"], sizes["K"], sizes["F"])
        one = sum(c * x for c, x in zip(self.layer, features))
        out = self.output[0] + self.output[1] * (2.0 * table.tokens * sizes["D"] * sizes["V"])
        return sizes["L"] * one + out


def fit_latency(table: LatencyTable) -> LatencyModel:
    """Least squares of the relative error, with coefficients of 0 or more.

    A layer is taken as separable: a constant + the residual stream's values (norms, additions) +
    FLOPs of the four projections + FLOPs of the three FFN matrices + FLOPs of attention. A negative
    coefficient would make a larger model the faster one, so there are none (the best of all subsets
    of the five features whose plain least squares is not negative, which is the exact answer).
    Steps of a kernel's tile size are not in it: expect a few percent, more at small sizes. At
    TP > 1 the collectives fall to the constant and the stream's values.
    """
    rows = table.layers
    D, Q, K, F = (
        np.array([getattr(row, name) for row in rows], dtype=np.float64)
        for name in ("hidden", "heads", "groups", "ffn")
    )
    seconds = np.array([row.seconds for row in rows])
    features = np.stack([np.broadcast_to(x, D.shape) for x in _layer_features(table, D, Q, K, F)])
    layer = _nonnegative(features.T, seconds)
    error = np.abs(features.T @ layer / seconds - 1).max()
    products = np.array([2.0 * table.tokens * row.hidden * row.vocab for row in table.outputs])
    output = _nonnegative(
        np.stack([np.ones_like(products), products], axis=1),
        np.array([row.seconds for row in table.outputs]),
    )
    return LatencyModel(
        table=table,
        layer=tuple(map(float, layer)),
        output=tuple(map(float, output)),
        worst_error=float(error),
    )


def _layer_features(table: LatencyTable, D: Any, Q: Any, K: Any, F: Any) -> tuple[Any, ...]:
    """Constant, stream values, and FLOPs of projections, FFN and causal attention."""
    tokens, width = float(table.tokens), table.kv_channels
    return (
        1.0,
        tokens * D,
        2 * tokens * D * width * 2 * (Q + K),
        2 * tokens * 3 * D * F,
        2 * tokens * Q * width * table.seq_length,
    )


def _nonnegative(
    features: NDArray[np.float64], seconds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[n, f] features, [n] seconds -> [f] coefficients of 0 or more, least relative squares."""
    relative = features / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    relative = relative / scale
    wanted = np.ones(len(seconds))
    best, best_error = np.zeros(features.shape[1]), np.inf
    for count in range(1, features.shape[1] + 1):
        for chosen in map(list, combinations(range(features.shape[1]), count)):
            found = np.linalg.lstsq(relative[:, chosen], wanted, rcond=None)[0]
            error = float(np.square(relative[:, chosen] @ found - wanted).sum())
            if (found >= 0).all() and error < best_error * (1 - 1e-12):
                best, best_error = np.zeros(features.shape[1]), error
                best[chosen] = found
    coefficients: NDArray[np.float64] = best / scale
    return coefficients
