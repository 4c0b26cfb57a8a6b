"""Names of dtypes, named random numbers, and the only slicing code: `take` along named axes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from megatron_prune.model.lazy import Tensor, torch

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # our words and torch's
DTYPE_WORDS = {name: word for word, name in DTYPES.items()}


def torch_dtype(word: str) -> torch.dtype:
    """The dtype of one of ``DTYPES``."""
    found: torch.dtype = getattr(torch, DTYPES[word])
    return found


def dtype_word(dtype: torch.dtype) -> str:
    """Our word for a dtype; torch's own for one that is not among ``DTYPES``."""
    return DTYPE_WORDS.get(str(dtype).removeprefix("torch."), str(dtype))


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on seed and name alone, whatever rank asks for them."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def expand_rows(index: Tensor, rows: int) -> Tensor:
    """Indices of an axis -> rows of a tensor that gives each index ``rows`` of them. int64."""
    if rows == 1:
        return index
    return (index[:, None] * rows + torch.arange(rows)).flatten()


def take(x: Tensor, axes: str, kept: Mapping[str, Tensor], rows: Mapping[str, int]) -> Tensor:
    """Keep some indices of some axes of a tensor.

    numpy does the copying: its ``take`` is four times as fast as ``index_select`` on rows and on
    columns alike (bf16, 11008 x 4096, one thread: 7 and 19 ms against 34 and 80).

    Args:
        x: one dim per letter of ``axes``; in host memory, of a dtype of 1 to 8 bytes.
        kept: axis -> [n] int64 sorted indices; an axis that is absent is kept whole.
        rows: axis -> rows per index, 1 when absent.

    Returns:
        A copy where something was dropped, else ``x`` itself.
    """
    if not any(axis in kept for axis in axes):
        return x
    values = x.view(getattr(torch, f"int{8 * x.dtype.itemsize}")).numpy()
    for dim, axis in enumerate(axes):
        if axis in kept:
            values = values.take(expand_rows(kept[axis], rows.get(axis, 1)).numpy(), axis=dim)
    return torch.from_numpy(values).view(x.dtype)
