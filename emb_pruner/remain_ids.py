"""``remain_vocab_ids.pt``: kept ids as the predecessor of this project writes and reads them.

A list of integers, or a tensor of them, in any order. Its files hold neither special tokens nor
what the kept tokens are merged from; without those a vocabulary cannot be pruned as promised here.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from emb_pruner.formats import Vocabulary
from megatron_prune.errors import ConfigError
from megatron_prune.files import replace_file

_SHOWN = 8


def read_ids(path: Path, size: int) -> list[int]:
    """The ids of a file, ascending.

    Args:
        size: of the tokenizer that they are of.

    Raises:
        ConfigError: missing, or holding something other than ids of that tokenizer, once each.
        DamagedError: not a file of ``torch.save``; nothing in it is executed.
    """
    import torch

    from megatron_prune.store.untrusted import load_untrusted

    if not path.is_file():
        raise ConfigError(f"{path}: no such file; wanted a remain_vocab_ids.pt")
    found = load_untrusted(path, mmap=False)
    if isinstance(found, torch.Tensor) and found.ndim == 1 and not found.is_floating_point():
        found = found.tolist()
    if not isinstance(found, list) or any(type(token) is not int for token in found):
        raise ConfigError(f"{path}: holds a {type(found).__name__}, wanted a list of integers")
    wrong = sorted({token for token in found if not 0 <= token < size})
    if wrong:
        raise ConfigError(
            f"{path}: {_some(wrong)}: no ids of this tokenizer, which has {size}; wanted the "
            "tokenizer that they were chosen from"
        )
    if len(set(found)) < len(found):
        raise ConfigError(f"{path}: {len(found) - len(set(found))} ids stand more than once")
    return sorted(found)


def write_ids(path: Path, ids: Sequence[int]) -> None:
    """Write kept ids as a list; what is at ``path`` is replaced."""
    import torch

    data = io.BytesIO()
    torch.save(list(ids), data)
    replace_file(path, data.getvalue())


def closed_ids(
    vocabulary: Vocabulary, ids: Sequence[int], *, close: bool, where: str
) -> tuple[int, ...]:
    """The ids with everything that has to stay with them, ascending.

    Args:
        close: add what is missing.
        where: the ids come from, for messages.

    Raises:
        ConfigError: something is missing, and is not to be added.
    """
    forest = vocabulary.forest
    closed = forest.closure(ids) | forest.required
    missing = sorted(closed - set(ids))
    if missing and not close:
        named = _some([f"{token} {vocabulary.token(token)!r}" for token in missing])
        raise ConfigError(
            f"{where}: {len(missing)} tokens are missing that have to stay, as special tokens, "
            f"single bytes or parts of others: {named}; --close adds them"
        )
    return tuple(sorted(closed))


def _some(values: Sequence[object]) -> str:
    more = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return ", ".join(map(str, values[:_SHOWN])) + more
