"""How often a corpus has each token, as a file: a NumPy archive, read without pickle.

Files of several machines add up, as long as they are of one tokenizer.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.files import replace_file
from megatron_prune.files.contents import no_archive
from megatron_prune.files.parsing import checked_as
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
_TOTALS = ("bytes", "characters", "documents")
_MOST_BYTES = 1 << 28  # unpacked: 30 million tokens


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What was counted.

    Attributes:
        counts_V: [V] int64, by id; V is the largest id there is and one.
        bytes: of text, in UTF-8. Token files (.bin) add nothing here or to the characters.
        characters: of text.
        documents: lines of JSON, text files, documents of token files.
        tokenizer_digest: as `megatron_prune.data.tokenizers.TextTokenizer.digest`.
    """

    counts_V: NDArray[np.int64]
    bytes: int
    characters: int
    documents: int
    tokenizer_digest: str

    @property
    def tokens(self) -> int:
        return int(self.counts_V.sum())


def save_counts(path: Path, counts: Counts) -> None:
    """Write a counts file, whole or not at all; what is at ``path`` is replaced."""
    archive = io.BytesIO()
    np.savez_compressed(
        archive,
        version=np.int64(VERSION),
        counts=counts.counts_V.astype(np.int64),
        tokens=np.int64(counts.tokens),
        tokenizer_digest=np.str_(counts.tokenizer_digest),
        **{name: np.int64(getattr(counts, name)) for name in _TOTALS},  # type: ignore[arg-type]
    )
    replace_file(path, archive.getvalue())


def load_counts(path: Path, tokenizer_digest: str | None = None) -> Counts:
    """Read a counts file.

    Args:
        tokenizer_digest: of the tokenizer that it has to be of; None: of any.

    Raises:
        ConfigError: missing, another kind of file, of another version, or of another tokenizer.
        DamagedError: it cannot be read, or contradicts itself.
    """
    if not path.is_file():
        raise ConfigError(f"{path}: is not there; wanted a file of `vocab count`")
    if what := no_archive(path):
        raise ConfigError(f"{path}: {what}; wanted a file of `vocab count`")
    with checked_as(DamagedError, path, "not a file of `vocab count`", "; count again"):
        with zipfile.ZipFile(path) as packed:
            if sum(record.file_size for record in packed.infolist()) > _MOST_BYTES:
                raise ValueError(f"holds more than {_MOST_BYTES >> 20} MiB")
        with np.load(path, allow_pickle=False) as archive:
            values = {name: archive[name] for name in archive.files}
    if not {"version", "counts", *_TOTALS} & values.keys():
        raise ConfigError(f"{path}: arrays of another kind; wanted a file of `vocab count`")
    with checked_as(DamagedError, path, "not a file of `vocab count`", "; count again"):
        version = int(values["version"])
    if version != VERSION:
        raise ConfigError(f"{path}: counts of version {version}; this reads {VERSION}")
    with checked_as(DamagedError, path, "not a file of `vocab count`", "; count again"):
        counts = Counts(
            counts_V=values["counts"],
            tokenizer_digest=str(values["tokenizer_digest"]),
            **{name: int(values[name]) for name in _TOTALS},
        )
        _check(counts, int(values["tokens"]))
    if tokenizer_digest not in (None, counts.tokenizer_digest):
        raise ConfigError(
            f"{path}: counts of another tokenizer (digest {counts.tokenizer_digest[:12]}, "
            f"{counts.counts_V.size} ids), wanted {str(tokenizer_digest)[:12]}; count with this one"
        )
    return counts


def _check(counts: Counts, tokens: int) -> None:
    given = counts.counts_V
    if given.dtype != np.int64 or given.ndim != 1 or given.size == 0:
        raise ValueError(f"counts are {given.dtype}{list(given.shape)}, wanted int64[V]")
    if int(given.min()) < 0 or counts.tokens != tokens:
        raise ValueError(f"counts add up to {counts.tokens}, the file tells of {tokens} tokens")


def merge_counts(paths: Sequence[Path]) -> Counts:
    """The sum of several counts files.

    Raises:
        ConfigError: of different tokenizers, or a file that is named twice.
        DamagedError: see `load_counts`.
    """
    twice = [
        path
        for place, path in enumerate(paths)
        if path.resolve() in {other.resolve() for other in paths[:place]}
    ]
    if twice:
        raise ConfigError(f"--merge {twice[0]}: named twice; its tokens would count twice")
    total = load_counts(paths[0])
    for path in paths[1:]:
        more = load_counts(path, total.tokenizer_digest)
        if more.counts_V.size != total.counts_V.size:
            raise DamagedError(
                f"{path}: {more.counts_V.size} ids, {paths[0]} has {total.counts_V.size} of the "
                "same tokenizer; count again"
            )
        total = replace(
            total,
            counts_V=total.counts_V + more.counts_V,
            **{name: getattr(total, name) + getattr(more, name) for name in _TOTALS},
        )
    return total
