"""Process groups: who holds which part of the model, and which copy of the data.

The world is ``TP x CP x DP x PP`` in Megatron's order: tensor-parallel ranks lie next to each
other, then those that share a sequence (context parallelism), then data-parallel copies, and
pipeline stages last. Only `train` has context parallelism.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_prune.engine.failures import named_failures
from megatron_prune.errors import ShapeError
from megatron_prune.model.grid import ParallelGrid
from megatron_prune.model.lazy import dist, torch
from megatron_prune.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, kw_only=True)
class Groups:
    """This process's place in the grid, and the groups it talks to."""

    ranks: Ranks
    grid: ParallelGrid
    tp_rank: int
    pp_rank: int
    dp_rank: int
    data_parallel: int
    device: torch.device
    tp_group: ProcessGroup
    pp_group: ProcessGroup
    dp_group: ProcessGroup
    cp_group: ProcessGroup
    copies_group: ProcessGroup  # all ranks with the same weights: DP x CP

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.grid.pipeline_parallel - 1

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value's sum over all ranks, in float64, the same on all of them."""
        exchanged = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(exchanged)
        summed: list[float] = exchanged.tolist()
        return summed


def world_size() -> int:
    """Processes torchrun (or Slurm) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def data_parallel_size(grid: ParallelGrid, processes: int, context_parallel: int = 1) -> int:
    """Copies of the model that ``processes`` make room for, each seeing other samples.

    Raises:
        ShapeError: the processes do not divide by TP x PP x CP.
    """
    one = grid.world_size * context_parallel
    if processes % one:
        context = f" x context-parallel-size {context_parallel}" if context_parallel > 1 else ""
        raise ShapeError(
            f"{processes} processes do not make whole models of "
            f"tensor-model-parallel-size {grid.tensor_parallel} x pipeline-model-parallel-size "
            f"{grid.pipeline_parallel}{context} = {one}; start a multiple of {one} "
            f"(torchrun --nproc-per-node {one}) or change the sizes"
        )
    return processes // one


def _join(timeout: timedelta) -> torch.device:
    """Join the world: NCCL with one GPU a process, else gloo. Alone, nothing listens on a port."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if world_size() == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=timeout)
    return device


@contextmanager
def model_parallel(
    grid: ParallelGrid,
    *,
    context_parallel: int = 1,
    seed: int = 1234,
    timeout_minutes: float = 10,
) -> Iterator[Groups]:
    """Build Megatron's process groups and seed its random numbers; torn down on the way out.

    A failure in it is told with its rank's name (`named_failures`).

    Raises:
        ShapeError: the world size does not fit the grid.
    """
    copies = data_parallel_size(grid, world_size(), context_parallel)
    from megatron_prune.engine import cpu

    cpu.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    with named_failures():
        device = _join(timedelta(minutes=timeout_minutes))
        try:
            with cpu.shared_groups():
                parallel_state.initialize_model_parallel(
                    tensor_model_parallel_size=grid.tensor_parallel,
                    pipeline_model_parallel_size=grid.pipeline_parallel,
                    context_parallel_size=context_parallel,
                    distributed_timeout_minutes=timeout_minutes,
                )
            pp_rank = parallel_state.get_pipeline_model_parallel_rank()
            torch.manual_seed(seed + 100 * pp_rank)
            model_parallel_cuda_manual_seed(seed + 100 * pp_rank)
            yield Groups(
                ranks=Ranks(rank=dist.get_rank(), world_size=dist.get_world_size()),
                grid=grid,
                tp_rank=parallel_state.get_tensor_model_parallel_rank(),
                pp_rank=pp_rank,
                dp_rank=parallel_state.get_data_parallel_rank(),
                data_parallel=copies,
                device=device,
                tp_group=parallel_state.get_tensor_model_parallel_group(),
                pp_group=parallel_state.get_pipeline_model_parallel_group(),
                dp_group=parallel_state.get_data_parallel_group(),
                cp_group=parallel_state.get_context_parallel_group(),
                copies_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
