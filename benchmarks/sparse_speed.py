"""What 2:4 saves where kernels are made for it: torch's semi-structured tensors against dense ones.

  python benchmarks/sparse_speed.py
  python benchmarks/sparse_speed.py --tokens 1 8 64 --repeats 30

The linears of Llama-2-7B in bf16, pruned to 2:4 by magnitude, times as many tokens as go through at
once (1: one sequence that writes; 4096: prompts). Each is timed dense and as
``torch.sparse.to_sparse_semi_structured`` by both of its backends, cuSPARSELt and CUTLASS; torch
has its CUTLASS kernels for Ampere and Ada only. Every product is first held against the dense one.

A backend's ratio is the dense time over its own, 2 is what the arithmetic allows. So that a weight
comes from the GPU's memory as in a model, calls go round copies of it that do not fit its caches.
Calls are recorded as a CUDA graph; where a backend cannot be recorded its times hold what calling
from Python costs, and a star is beside them. Medians of ``--repeats``.

Sizes are by formula: half of the values, and two bits for the place of each. Without a GPU they are
all there is.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from megatron_prune.sparsity.choosing import lowest_in_groups, without
from megatron_prune.sparsity.method import Pattern

LINEARS = {  # Llama-2-7B: rows, columns, how many in a layer
    "q, k, v, o": (4096, 4096, 4),
    "gate, up": (11008, 4096, 2),
    "down": (4096, 11008, 1),
}
LAYERS = 32
BACKENDS = ("cuSPARSELt", "CUTLASS")
TWO_OF_FOUR = Pattern(keep=2, group=4)
_CACHES_BYTES = 1 << 28  # no GPU has a larger last cache
_TOLERANCE = 1e-2  # of bf16 products, whose sums are taken in another order


def dense_bytes(rows: int, columns: int, item_bytes: int = 2) -> int:
    return rows * columns * item_bytes


def packed_bytes(rows: int, columns: int, item_bytes: int = 2) -> int:
    """Half of the values, and two bits each for where in its group of four it is."""
    kept = rows * columns // 2
    return kept * item_bytes + kept * 2 // 8


def pruned(weight: Tensor) -> Tensor:
    """2:4 of it by magnitude."""
    return without(weight, lowest_in_groups(weight.float().abs(), TWO_OF_FOUR)[0])


def packed(weight: Tensor, backend: str) -> Tensor:
    """A 2:4 matrix on a GPU as torch's semi-structured tensor of a backend.

    Raises:
        RuntimeError: the backend does not know this GPU, or torch was built without it.
    """
    from torch.sparse import SparseSemiStructuredTensor, to_sparse_semi_structured

    before = SparseSemiStructuredTensor._FORCE_CUTLASS
    SparseSemiStructuredTensor._FORCE_CUTLASS = backend == "CUTLASS"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is a prototype
            return to_sparse_semi_structured(weight)
    finally:
        SparseSemiStructuredTensor._FORCE_CUTLASS = before


def distance(found: Tensor, wanted: Tensor) -> float:
    """``||found - wanted|| / ||wanted||``."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def check_product(found: Tensor, wanted: Tensor, backend: str) -> None:
    """Raises:
    SystemExit: it is another product.
    """
    apart = distance(found, wanted)
    if not apart <= _TOLERANCE:
        raise SystemExit(f"{backend}: the product is {apart:.3g} off the dense one")


def milliseconds(weights: Sequence[Tensor], x_TI: Tensor, repeats: int) -> tuple[float, bool]:
    """Of one product, and whether calls were recorded as a graph."""

    def work() -> None:
        for weight in weights:
            linear(x_TI, weight)

    for _ in range(3):
        work()
    torch.cuda.synchronize()
    call, recorded = _recorded(work)
    taken = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / len(weights))
    return statistics.median(taken), recorded


def _recorded(work: Callable[[], None]) -> tuple[Callable[[], None], bool]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return work, False
    graph.replay()
    return graph.replay, True


def missing() -> dict[str, str]:
    """Backends that this GPU or this torch does not have, and what torch says of it."""
    rows, columns, _ = LINEARS["q, k, v, o"]
    weight = pruned(torch.randn(rows, columns, device="cuda").to(torch.bfloat16))
    found = {}
    for backend in BACKENDS:
        try:
            with torch.no_grad():
                linear(weight[:16], packed(weight, backend))
        except (RuntimeError, NotImplementedError) as error:
            found[backend] = str(error).splitlines()[0]
    return found


@torch.no_grad()
def rows_of_table(backends: Sequence[str], tokens: Sequence[int], repeats: int) -> Iterator[str]:
    """A line for each linear and number of tokens."""
    for name, (rows, columns, _) in LINEARS.items():
        copies = _CACHES_BYTES // packed_bytes(rows, columns) + 1
        weight = pruned(torch.randn(rows, columns, device="cuda").to(torch.bfloat16))
        kinds = {"dense": [weight.clone() for _ in range(copies)]}
        for backend in backends:
            kinds[backend] = [packed(weight, backend) for _ in range(copies)]
        for count in tokens:
            x_TI = torch.randn(count, columns, device="cuda", dtype=torch.bfloat16)
            wanted = linear(x_TI, weight)
            times = {}
            for kind, weights in kinds.items():
                check_product(linear(x_TI, weights[0]), wanted, kind)
                times[kind] = milliseconds(weights, x_TI, repeats)
            yield row(f"{rows} x {columns} ({name})", count, times)


def row(name: str, tokens: int, times: dict[str, tuple[float, bool]]) -> str:
    """Of the table: the dense time, and of each backend by how much it is faster."""
    dense, _ = times["dense"]
    cells = []
    for backend in BACKENDS:
        if backend not in times:
            cells.append("none")
            continue
        taken, recorded = times[backend]
        cells.append(f"{dense / taken:.2f}{'' if recorded else ' *'}")
    return f"| {name} | {tokens} | {dense * 1e3:.1f} | {' | '.join(cells)} |"


def sizes() -> Iterator[str]:
    """The table of bytes, a line at a time."""
    yield "| linear | dense (MB) | packed (MB) | share |"
    yield "|---|---|---|---|"
    whole = [0, 0]
    for name, (rows, columns, count) in LINEARS.items():
        both = [dense_bytes(rows, columns), packed_bytes(rows, columns)]
        whole = [a + LAYERS * count * b for a, b in zip(whole, both)]
        yield _size_row(f"{rows} x {columns} ({name})", *both)
    yield _size_row(f"all of {LAYERS} layers", *whole)


def _size_row(name: str, dense: int, packed: int) -> str:
    return f"| {name} | {dense / 1e6:.1f} | {packed / 1e6:.1f} | {packed / dense:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    for line in sizes():
        print(line)
    print()
    if not torch.cuda.is_available():
        print("no GPU: torch's 2:4 kernels need CUDA, so nothing was timed")
        return
    absent = missing()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16")
    for backend, reason in absent.items():
        print(f"no {backend}: {reason}")
    print(f"\n| linear | tokens | dense (µs) | {' | '.join(BACKENDS)} |")
    print("|---|---|---|" + "---|" * len(BACKENDS))
    backends = [backend for backend in BACKENDS if backend not in absent]
    for line in rows_of_table(backends, args.tokens, args.repeats):
        print(line, flush=True)


if __name__ == "__main__":
    main()
