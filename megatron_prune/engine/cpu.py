"""Megatron-Core on a machine without a GPU: what it needs, in one place. No-op where CUDA is.

Megatron-Core asks for CUDA by name (``device='cuda'``, ``.cuda()``, ``Tensor.type()`` in its
optimizer, ``torch.cuda.current_device()``) in places that need nothing of it. Without CUDA those
names mean the CPU here, for this process only. `groups.model_parallel` installs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CUDA_TYPE_NAMES = {
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}
_mode: TorchFunctionMode | None = None


def _is_cuda(device: Any) -> bool:
    return device is not None and str(device).startswith("cuda")


def _names_cuda(args: tuple[Any, ...]) -> bool:
    return len(args) > 1 and isinstance(args[1], (str, torch.device)) and _is_cuda(args[1])


class CudaMeansCpu(TorchFunctionMode):
    """``cuda`` devices become ``cpu`` in factories, `.to` and `.cuda`; `.type()` says CUDA's names;
    no memory is pinned.

    The optimizer compares type names with CUDA's. A mode costs about a microsecond per torch call
    made from Python: measured 0.2% of a training step of a 135M model.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return _CUDA_TYPE_NAMES.get(name, name)
        if kwargs.get("pin_memory"):
            kwargs = dict(kwargs, pin_memory=False)
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = dict(kwargs, device="cpu")
        elif func is torch.Tensor.to and _names_cuda(args):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


def install() -> None:
    """Make Megatron-Core run on this machine; idempotent, and a no-op with CUDA."""
    global _mode
    if torch.cuda.is_available() or _mode is not None:
        return
    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    get_state: Any = lambda device=None: torch.get_rng_state()  # noqa: E731
    set_state: Any = lambda state, device=None: torch.set_rng_state(state)  # noqa: E731
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = get_state
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = set_state
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]

    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: (
        torch.set_rng_state(state)
    )
    megatron_random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    _mode = CudaMeansCpu()
    _mode.__enter__()


@contextmanager
def shared_groups() -> Iterator[None]:
    """While Megatron makes its process groups: one for each set of ranks. A no-op with CUDA.

    Megatron makes some forty, for kinds of parallelism that mostly have the same few sets of ranks.
    With gloo each has three threads that wake up a hundred times a second: four ranks spent a
    quarter of two cores on that. Ranks meet in a group in the order of the program, which is one.
    """
    if torch.cuda.is_available():
        yield
        return
    from megatron.core import parallel_state

    make, made = parallel_state.create_group, dict[tuple[int, ...], Any]()

    def create_group(ranks: Sequence[int], **how: Any) -> Any:
        key = tuple(ranks)
        if key not in made:
            made[key] = make(ranks, **how)
        return made[key]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = make
