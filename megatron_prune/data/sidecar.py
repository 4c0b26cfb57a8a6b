"""Look at a .bin/.idx pair before training on it: whole, consistent, and made with this tokenizer.

The index is read once, in pieces (20 bytes a sequence), and every number in it that can be wrong is
checked; of the .bin only its size and a sample are looked at. With a sidecar (``PREFIX.json``,
written by ``preprocess``) the index's hash, the tokenizer and the largest id are checked too, and
with ``read_all`` every byte of the .bin. A corpus of stock Megatron-LM has no sidecar: then nothing
tells which tokenizer made it, and ids out of the vocabulary are only found where the sample meets
them.

Files that are cut short or do not belong together are refused as damaged (exit 3). A corpus that is
not there, that has no tokens or another tokenizer's ids is refused as a mistake (exit 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prune.data.indexed import HEADER, MAGIC, TYPES, corpus_path
from megatron_prune.errors import ConfigError, DamagedError
from megatron_prune.files import hash_file
from megatron_prune.files.parsing import checked_as, read_table
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIDECAR_VERSION = 1
_PIECE = 1 << 18  # sequences of the index checked at a time
_SAMPLES, _SAMPLE_TOKENS = 64, 1 << 12  # half a megabyte of a .bin, evenly spread
_AGAIN = "copy it again, or run preprocess with --overwrite"


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What a corpus is. The last three are None without a sidecar."""

    prefix: str
    documents: int
    sequences: int
    tokens: int
    dtype: str
    tokenizer_digest: str | None
    eod: int | None
    max_token_id: int | None


def check_corpus(
    prefix: str | Path,
    tokenizer_digest: str | None,
    vocab_size: int,
    *,
    read_all: bool = False,
    to_learn_from: bool = True,
) -> CorpusFacts:
    """Check the corpus at ``prefix`` against itself, its sidecar, and the model that will read it.

    Args:
        prefix: ``/data/en_text_document``, without ``.bin``.
        tokenizer_digest: of the model's tokenizer; None when the checkpoint carries none.
        vocab_size: the model's true vocabulary size.
        read_all: hash the whole .bin, about 0.8 s a gigabyte and the reading.
        to_learn_from: refuse tokens that are all the same, but for EOD, as far as a sample tells.

    Raises:
        ConfigError: no such corpus, an empty one, or one made with another tokenizer.
        DamagedError: a file missing from the pair, cut short, or not as it was written.
    """
    prefix = str(prefix)
    _refuse_missing(prefix)
    dtype, sequences, documents = _read_header(prefix)
    tokens = _check_index(prefix, dtype, sequences, documents)
    found = corpus_path(prefix, ".bin").stat().st_size
    if found != tokens * dtype.itemsize:
        raise DamagedError(
            f"{prefix}.bin: {found} bytes, but {prefix}.idx tells of {tokens} tokens of "
            f"{dtype.itemsize} bytes "
            f"({tokens * dtype.itemsize}); {_AGAIN}"
        )
    if tokens == 0:
        raise ConfigError(
            f"{prefix}: an empty corpus, {documents} documents and no token; nothing to train on"
        )
    sidecar = load_sidecar(prefix)
    if sidecar is not None:
        _check_sidecar(prefix, sidecar, tokens, documents, read_all=read_all)
        _check_tokenizer(prefix, sidecar, tokenizer_digest, vocab_size)
    known = sidecar or {}
    distinct = _check_sample(prefix, dtype, tokens, vocab_size) - {known.get("eod")}
    if to_learn_from and tokens > 1 and len(distinct) < 2:
        raise ConfigError(
            f"{prefix}.bin: its tokens all have the id {min(distinct, default=known.get('eod'))}, "
            "nothing can be learned from them; run preprocess with a tokenizer that knows the "
            "text's script"
        )
    return CorpusFacts(
        prefix=prefix,
        documents=documents,
        sequences=sequences,
        tokens=tokens,
        dtype=dtype.name,
        tokenizer_digest=known.get("tokenizer_digest"),
        eod=known.get("eod"),
        max_token_id=known.get("max_token_id"),
    )


def load_sidecar(prefix: str | Path) -> dict[str, Any] | None:
    """The facts ``preprocess`` wrote beside the corpus; None when there is no sidecar.

    Raises:
        DamagedError: a file that is not one.
    """
    path = corpus_path(prefix, ".json")
    if not path.is_file():
        return None
    wanted = {
        "documents": int,
        "tokens": int,
        "max_token_id": int,
        "vocab_size": int,
        "tokenizer_digest": str,
    }
    what, advice = "not the sidecar of a corpus", f"; {_AGAIN}"
    sidecar = read_table(path, DamagedError, what, advice=advice)
    if (version := sidecar.get("version")) != SIDECAR_VERSION and isinstance(version, int):
        raise ConfigError(f"{path}: version {version}, this program reads {SIDECAR_VERSION}")
    with checked_as(DamagedError, path, what, advice):
        wrong = [key for key, kind in wanted.items() if not isinstance(sidecar[key], kind)]
        wrong += [] if isinstance(sidecar.get("eod"), int | None) else ["eod"]
        hashes = [sidecar[part][key] for part in ("bin", "idx") for key in ("bytes", "sha256")]
        if wrong or not all(isinstance(value, int | str) for value in (version, *hashes)):
            raise ValueError(f"wrong kind of {', '.join(wrong) or 'hash'}")
    return sidecar


def _refuse_missing(prefix: str) -> None:
    there = [corpus_path(prefix, suffix).is_file() for suffix in (".bin", ".idx")]
    if all(there):
        return
    if any(there):
        have, lack = (".bin", ".idx") if there[0] else (".idx", ".bin")
        raise DamagedError(
            f"{prefix}: there is a {have} but no {lack}; copy it too, or run preprocess again: it "
            "finishes what was interrupted"
        )
    hint = ""
    if Path(prefix).is_file():
        hint = ", it is a file; `megatron-prune preprocess` makes a corpus of .jsonl"
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            hint = f"; leave out {suffix}"
    for level in ("document", "sentence"):
        if corpus_path(f"{prefix}_text_{level}", ".idx").is_file():
            hint = f"; did you mean {prefix}_text_{level}?"
    raise ConfigError(f"no corpus at {prefix}: neither {prefix}.bin nor {prefix}.idx{hint}")


def _read_header(prefix: str) -> tuple[np.dtype[Any], int, int]:
    """Type, number of sequences, number of documents; the size of the index fits them."""
    path = corpus_path(prefix, ".idx")
    with open(path, "rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[: len(MAGIC)] != MAGIC:
        raise DamagedError(f"{path}: not a Megatron index (it starts with {head[:9]!r}); {_AGAIN}")
    _, version, code, sequences, ends = HEADER.unpack(head)
    if version != 1 or code not in TYPES or ends < 1:
        raise DamagedError(
            f"{path}: version {version}, type {code}, {ends} document ends: not an index of "
            f"tokens; {_AGAIN}"
        )
    wanted, found = HEADER.size + 12 * sequences + 8 * ends, path.stat().st_size
    if found != wanted:
        raise DamagedError(
            f"{path}: {found} bytes, wanted {wanted} for {sequences} sequences and {ends - 1} "
            f"documents; {_AGAIN}"
        )
    return np.dtype(TYPES[code]), sequences, ends - 1


def _check_index(prefix: str, dtype: np.dtype[Any], sequences: int, documents: int) -> int:
    """Lengths, offsets and document ends fit each other; returns the number of tokens."""
    path = corpus_path(prefix, ".idx")
    at_offsets, at_ends = HEADER.size + 4 * sequences, HEADER.size + 12 * sequences
    expected = 0
    for start in range(0, sequences, _PIECE):
        count = min(_PIECE, sequences - start)
        lengths = _read(path, "<i4", HEADER.size + 4 * start, count).astype(np.int64)
        offsets = _read(path, "<i8", at_offsets + 8 * start, count)
        ends = expected + np.cumsum(lengths) * dtype.itemsize
        wrong = (lengths < 0) | (offsets != np.concatenate([[expected], ends[:-1]]))
        if wrong.any():
            at = int(wrong.argmax())
            raise DamagedError(
                f"{path}: sequence {start + at} has length {lengths[at]} at byte {offsets[at]}, "
                f"which does not follow the one before; {_AGAIN}"
            )
        expected = int(ends[-1])
    last = 0
    for start in range(0, documents + 1, _PIECE):
        firsts = _read(path, "<i8", at_ends + 8 * start, min(_PIECE, documents + 1 - start))
        rising = bool((np.diff(firsts) >= 0).all()) and int(firsts[0]) >= last
        if not rising or (start == 0 and firsts[0] != 0):
            raise DamagedError(f"{path}: the documents' first sequences are not in order; {_AGAIN}")
        last = int(firsts[-1])
    if last != sequences:
        raise DamagedError(f"{path}: the documents end at sequence {last} of {sequences}; {_AGAIN}")
    return expected // dtype.itemsize


def _read(path: Path, kind: str, offset: int, count: int) -> NDArray[Any]:
    return np.fromfile(path, dtype=kind, count=count, offset=offset)


def _check_sidecar(
    prefix: str, sidecar: dict[str, Any], tokens: int, documents: int, *, read_all: bool
) -> None:
    if (sidecar["tokens"], sidecar["documents"]) != (tokens, documents):
        raise DamagedError(
            f"{prefix}: {tokens} tokens in {documents} documents, its sidecar {prefix}.json tells "
            f"of {sidecar['tokens']} "
            f"in {sidecar['documents']}: files of two corpora; {_AGAIN}"
        )
    for suffix in (".idx", ".bin") if read_all else (".idx",):
        path = corpus_path(prefix, suffix)
        if hash_file(path).sha256 != sidecar[suffix[1:]]["sha256"]:
            raise DamagedError(
                f"{path}: its sha256 is not the one in {prefix}.json: changed since it was "
                f"written; {_AGAIN}"
            )


def _check_tokenizer(
    prefix: str, sidecar: dict[str, Any], digest: str | None, vocab_size: int
) -> None:
    made_with = sidecar.get("tokenizer", "another tokenizer")
    if digest is not None and sidecar["tokenizer_digest"] != digest:
        raise ConfigError(
            f"{prefix}: its ids are those of {made_with} ({sidecar['vocab_size']} tokens, digest "
            f"{sidecar['tokenizer_digest'][:12]}), the model's tokenizer is another (digest "
            f"{digest[:12]}); run preprocess "
            "with the model's own"
        )
    if sidecar["max_token_id"] >= vocab_size:
        raise ConfigError(
            f"{prefix}: holds token id {sidecar['max_token_id']}, the model's vocabulary has "
            f"{vocab_size}; it was made with "
            f"{made_with} ({sidecar['vocab_size']} tokens): run preprocess with the model's own"
        )


def _check_sample(prefix: str, dtype: np.dtype[Any], tokens: int, vocab_size: int) -> set[int]:
    """The ids of a sample, all within the vocabulary."""
    path = corpus_path(prefix, ".bin")
    distinct: set[int] = set()
    last = max(tokens - _SAMPLE_TOKENS, 0)
    for start in sorted({last * i // (_SAMPLES - 1) for i in range(_SAMPLES)}):
        ids = _read(path, dtype.str, start * dtype.itemsize, min(_SAMPLE_TOKENS, tokens))
        wrong = (ids < 0) | (ids >= vocab_size)
        if wrong.any():
            at = int(wrong.argmax())
            raise ConfigError(
                f"{path}: token {start + at} has the id {ids[at]}, the model's vocabulary has "
                f"{vocab_size}; "
                "the corpus was made with another tokenizer: run preprocess with the model's own"
            )
        distinct.update(np.unique(ids).tolist())
    return distinct
