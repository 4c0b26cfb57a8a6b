"""Options that several stages share, and what they become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from megatron_prune import __version__
from megatron_prune.errors import ConfigError, StorageError
from megatron_prune.families import FAMILIES
from megatron_prune.flags import flag, flag_name, given
from megatron_prune.model.shape import ModelShape
from megatron_prune.ranks import Ranks
from megatron_prune.sources.finite import FiniteSource
from megatron_prune.sources.source import Source
from megatron_prune.store import open_source
from megatron_prune.store.commit import check_target

FORMATS = ("torch_dist", "torch")


@dataclass(frozen=True, kw_only=True)
class Loads:
    """Of a stage that reads a checkpoint."""

    load: Path = flag("checkpoint; format is detected", metavar="SRC")
    family: str | None = flag(
        "of a stock Megatron checkpoint whose arguments do not tell",
        default=None,
        choices=tuple(FAMILIES),
    )


@dataclass(frozen=True, kw_only=True)
class AllowsNonfinite(Loads):
    """Of a stage that refuses weights which are no numbers."""

    can_allow_nonfinite: ClassVar[bool] = True
    allow_nonfinite: bool = flag("go on where weights are NaN or infinite", default=False)

    def checked(self, source: Source) -> FiniteSource:
        """A source whose weights are looked at as they are read."""
        return FiniteSource(source, allow=self.allow_nonfinite, can_allow=self.can_allow_nonfinite)


@dataclass(frozen=True, kw_only=True)
class Saves(AllowsNonfinite):
    """Of a stage that writes a checkpoint."""

    save: Path = flag("new directory", metavar="DST")
    overwrite: bool = flag("replace DST once the new one is complete", default=False)
    dry_run: bool = flag("check and print, write nothing", default=False)


@dataclass(frozen=True, kw_only=True)
class LegacyNames:
    """The layer spec whose names the legacy format uses."""

    transformer_impl: str = flag(
        "layer spec that a legacy checkpoint names its norms for",
        default="transformer_engine",
        choices=("transformer_engine", "local"),
    )

    @property
    def te_norms(self) -> bool:
        return self.transformer_impl == "transformer_engine"


def give_one(options: object, *names: str) -> str:
    """The one of several options that is given.

    Raises:
        ConfigError: none of them or several.
    """
    found = [name for name in names if name in given(options)]
    if len(found) != 1:
        said = " and ".join(map(flag_name, found)) or "nothing"
        raise ConfigError(f"{said}: give one of {' and '.join(map(flag_name, names))}")
    return found[0]


@contextmanager
def opened(path: Path, family: str | None) -> Iterator[Source]:
    """The source at ``path``, closed at the end."""
    source = open_source(path, family=family)
    try:
        yield source
    finally:
        source.close()


def check_save(save: Path, load: Path, *, overwrite: bool) -> None:
    """Refuse the output, or an output that is the input, before anything is opened."""
    target, source = save.resolve(), load.resolve()
    if target == source or source in target.parents or target in source.parents:
        raise ConfigError(f"--save {save}: is or holds --load {load}; inputs never change")
    check_target(save, overwrite=overwrite)


def check_output_file(
    path: Path, *, overwrite: bool, inputs: Iterable[Path | None], flag: str = "--save"
) -> None:
    """Refuse a file that is to be written, before anything is opened.

    Args:
        inputs: what the stage reads; None stands for nothing.

    Raises:
        ConfigError: a directory, there already, or an input or inside of one.
        StorageError: its place is missing.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a directory; wanted a file")
    check_not_input(flag, path, inputs)
    if path.exists() and not overwrite:
        raise ConfigError(f"{flag} {path}: exists; remove it or use --overwrite")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"{flag} {path}: {path.parent} does not exist; make it first")


def check_not_input(flag: str, path: Path, inputs: Iterable[Path | None]) -> None:
    """Refuse an output that is one of the inputs, or inside of one.

    Raises:
        ConfigError: it is.
    """
    for one in inputs:
        if one is not None and path.resolve().is_relative_to(one.resolve()):
            raise ConfigError(
                f"{flag} {path}: is or lies in {one}, one of the inputs; they never change, "
                "choose another place"
            )


def agree_on_start(ranks: Ranks, options: object, source: Source | None) -> None:
    """Refuse ranks that were started with different arguments, from different versions, or that
    opened different models; without ``source`` the writing looks at that."""
    ranks.agree("the version of megatron_prune", __version__)
    ranks.agree("the command line", repr(options))
    if source is not None:
        ranks.agree_on(f"the model in {source.path}", lambda: source.digest)


def shape_table(source: ModelShape, target: ModelShape | None = None) -> str:
    """Sizes under Megatron's names, one per line; two columns with a target."""
    rows, last = [], target or source
    for name, size in source.as_dict().items():
        if isinstance(size, int):
            after = "" if target is None else f"{target.as_dict()[name]:>10}"
            rows.append(f"{name:<22}{size:>10}{after}")
    if last.ffn_per_layer is not None:  # ffn_hidden_size is then the widest
        rows.append(f"{'ffn_per_layer':<22}{' '.join(map(str, last.ffn_per_layer))}")
    return "\n".join(rows)
