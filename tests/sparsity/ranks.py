"""Ranks as threads: each has its rows, and a sum over all is a real one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from megatron_prune.solve.kselect import Dealt

Result = TypeVar("Result")


def on_ranks(ranks: int, work: Callable[[Dealt], Result]) -> list[Result]:
    """What ``work`` returns on each of so many ranks, which meet at every sum.

    Tensors of different shapes in one sum are an error on all ranks, as is one rank's error.
    """
    barrier = threading.Barrier(ranks)
    sent: list[Tensor | None] = [None] * ranks
    results: list[Result | None] = [None] * ranks
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        def total(x: Tensor) -> Tensor:
            sent[rank] = x
            barrier.wait(60)
            shapes = {(tuple(s.shape), s.dtype) for s in sent if s is not None}
            assert len(shapes) == 1 and x.dtype in (torch.int64, torch.float64), shapes
            summed = torch.stack([s for s in sent if s is not None]).sum(0)
            barrier.wait(60)
            return summed

        try:
            results[rank] = work(Dealt(rank=rank, ranks=ranks, total=total))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = threading.BrokenBarrierError
    for error in sorted(errors, key=lambda e: isinstance(e, broken)):
        raise error
    return [result for result in results if result is not None]


def split_rows(x: Tensor, shares: Sequence[int]) -> list[Tensor]:
    return list(x.split(list(shares)))
