"""Opening pickles from strangers without running anything in them.

`torch.load(weights_only=True)` builds only tensors and plain containers. Megatron's files also name
a few classes (argument enums, numpy arrays of the random state); those are put in as inert
stand-ins. Any other name is refused, and no code of the file is ever imported or called.
"""

from __future__ import annotations

import pickle
import threading
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from megatron_prune.errors import CheckpointError, DamagedError
from megatron_prune.files.contents import foreign_content
from megatron_prune.model.lazy import Tensor, torch

_STAND_IN_PREFIXES = ("megatron.", "numpy.", "transformer_engine.", "signal.", "enum.", "pathlib.")
_STAND_IN_NAMES = {"_codecs.encode", "_io.BytesIO", "types.SimpleNamespace"}
_LOCK = threading.Lock()  # what torch may build is one list for all threads


class BoundedUnpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, for subclasses that allow some names.

    It is three times as slow as the one in C, which a single flipped bit makes ask for 16 GiB: that
    one's memo is an array as long as the largest number that a file puts something at.
    """

    dispatch: ClassVar[
        dict[int, Any]
    ] = {  # nor a bytearray of whatever length it says, before there are bytes
        code: load
        for code, load in pickle._Unpickler.dispatch.items()
        if code != pickle.BYTEARRAY8[0]
    }


class Opaque:
    """In place of an object we neither need nor trust."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __reduce__(self) -> Any:
        raise DamagedError("names a class that no state of a run needs; it is not written again")


def load_untrusted(path: Path, *, mmap: bool) -> Any:
    """A ``torch.save`` file as tensors, containers, ``Namespace`` and `Opaque` stand-ins.

    With ``mmap`` the tensors are views of the file and nothing is read until it is used.

    Raises:
        DamagedError: the file is cut short, or names something that is not allowed.
    """
    try:
        with _LOCK, _only_ours():
            return _load(path, mmap)
    except DamagedError:
        raise
    except FileNotFoundError:
        raise DamagedError(f"{path}: is missing; copy it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        if what := foreign_content(path):
            raise CheckpointError(f"{path}: {what}") from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedError(f"{path}: cannot be read: {reason}; copy it again") from None


def plain_values(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Named tensors as their values alone, views where they can be: without the gradient that a
    parameter asks for, and with the signs that a lazy negation has not yet turned.

    Raises:
        CheckpointError: one has no values in rows and columns: sparse, nested or on device meta.
    """
    found = {}
    for name, x in tensors.items():
        if x.layout != torch.strided or x.is_meta or x.is_nested:
            kind = "on device meta" if x.is_meta else "nested" if x.is_nested else x.layout
            raise CheckpointError(
                f"{path}: {name} is {kind}; wanted plain values: load it with what wrote it and "
                "save dense tensors"
            )
        found[name] = x.detach().resolve_conj().resolve_neg()
    return found


@contextmanager
def _only_ours() -> Iterator[None]:
    """torch keeps one list of classes to build, and libraries add to it when they are imported:
    megatron-core numpy's arrays and paths, torch itself meshes of devices."""
    known = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(known)


def _load(path: Path, mmap: bool) -> Any:
    named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    named = [name for name in named if name != "argparse.Namespace"]
    refused = [
        n for n in named if not n.startswith(_STAND_IN_PREFIXES) and n not in _STAND_IN_NAMES
    ]
    if refused:
        raise DamagedError(
            f"{path}: names {', '.join(sorted(refused))}, which no model needs; not loaded"
        )
    allowed: list[Any] = [Namespace, *((Opaque, name) for name in named)]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
