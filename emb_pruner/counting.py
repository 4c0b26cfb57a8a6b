"""Count the tokens of a corpus: each different piece of text is encoded once, ids are added up.

The counts are exactly those of encoding every document whole, without special tokens added; special
tokens that are spelled out in a text count. Memory is that of the pieces under way and, for each
worker, of a table of pieces met and their ids, which is emptied when it is full: about 100 MB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from emb_pruner.counts import Counts
from emb_pruner.cutting import Cutter, cutter_for
from emb_pruner.formats import Vocabulary, open_vocabulary
from emb_pruner.reading import Ids, Input, Portion, TextBlock, read_pieces
from megatron_prune.data.corpus import map_pieces, parse_lines
from megatron_prune.data.indexed import corpus_path
from megatron_prune.errors import ConfigError
from megatron_prune.model.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

TABLE_CHARACTERS = 1 << 23
SPACE_LETTER = "Ġ"  # a space in byte-level vocabularies
_ENTRY = 32  # what an entry of the table weighs beside its characters


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one piece of a corpus holds; ``ids`` and how often, [n] int64 each."""

    ids: NDArray[np.int64]
    counts: NDArray[np.int64]
    bytes: int = 0
    characters: int = 0
    documents: int = 0


class TokenCounter:
    """Counts pieces for the tokenizer at ``path``, which every process opens for itself."""

    def __init__(self, path: Path, json_key: str) -> None:
        self._path = path
        self._json_key = json_key
        self._table: dict[str, list[int]] = {}
        self._weight = 0

    def __reduce__(self) -> tuple[Callable[..., TokenCounter], tuple[Path, str]]:
        return TokenCounter, (self._path, self._json_key)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return open_vocabulary(self._path)

    @cached_property
    def cutter(self) -> Cutter:
        return cutter_for(self.vocabulary)

    def __call__(self, piece: Portion) -> Tally:
        if isinstance(piece, Ids):
            return self._ids(piece)
        if isinstance(piece, TextBlock):
            return self._texts([piece.text], piece.documents, piece.spaces)
        texts = [row[0] for row in parse_lines(piece, [self._json_key])]
        return self._texts(texts, len(texts), 0)

    def _ids(self, piece: Ids) -> Tally:
        path, dtype = corpus_path(piece.prefix, ".bin"), np.dtype(piece.dtype)
        found = np.fromfile(path, dtype, piece.count, offset=piece.start * dtype.itemsize)
        wrong = (found < 0) | (found >= self.vocabulary.size)
        if wrong.any():
            at = int(wrong.argmax())
            raise ConfigError(
                f"{path}: token {piece.start + at} has the id {found[at]}, {self._path} has "
                f"{self.vocabulary.size} ids; the corpus was made with another tokenizer"
            )
        ids, counts = np.unique(found, return_counts=True)
        return Tally(
            ids=ids.astype(np.int64), counts=counts.astype(np.int64), documents=piece.documents
        )

    def _texts(self, texts: Sequence[str], documents: int, spaces: int) -> Tally:
        pieces: Counter[str] = Counter()
        for text in texts:
            pieces.update(self.cutter.pieces(text))
        found = self._encoded(list(pieces))
        lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
        tokens = np.fromiter(chain.from_iterable(found), dtype=np.int64, count=int(lengths.sum()))
        times = np.repeat(np.fromiter(pieces.values(), dtype=np.int64, count=len(pieces)), lengths)
        ids, places = np.unique(tokens, return_inverse=True)
        counts = np.zeros(ids.size, dtype=np.int64)
        np.add.at(counts, places, times)
        return Tally(
            ids=ids,
            counts=counts,
            bytes=sum(len(text.encode()) for text in texts) + spaces,
            characters=sum(map(len, texts)) + spaces,
            documents=documents,
        )

    def _encoded(self, pieces: list[str]) -> list[list[int]]:
        table = self._table
        new = [piece for piece in pieces if piece not in table]
        weight = sum(map(len, new)) + _ENTRY * len(new)
        if self._weight + weight > TABLE_CHARACTERS:
            table.clear()
            self._weight, new = 0, pieces
            weight = sum(map(len, new)) + _ENTRY * len(new)
        is_unit = self.cutter.unit.fullmatch if self.cutter.unit else lambda piece: None
        units = [piece for piece in new if is_unit(piece)]
        texts = [piece for piece in new if not is_unit(piece)]
        spelled = [unit.replace(" ", SPACE_LETTER) for unit in units]
        table.update(zip(units, self.vocabulary.encode_units(spelled), strict=True))
        table.update(zip(texts, self.vocabulary.encode(texts), strict=True))
        self._weight += weight
        return [table[piece] for piece in pieces]


def count_tokens(
    counter: TokenCounter,
    inputs: Iterable[Input],
    *,
    workers: int = 1,
    tell: Callable[[int], object] = lambda file_bytes: None,
) -> Counts:
    """Count all inputs.

    Args:
        tell: is called with how far the files on the disk have been read, from call to call.

    Raises:
        ConfigError: a file that is not what its kind says, ids out of the vocabulary, or no token.
        DamagedError: a broken packed file.
        DistributedError: a worker process died.
    """
    inputs = list(inputs)
    counts_V = np.zeros(counter.vocabulary.size, dtype=np.int64)
    sizes = dict.fromkeys(("bytes", "characters", "documents"), 0)
    for piece, tally in map_pieces(read_pieces(inputs, counter.cutter), counter, workers):
        counts_V[tally.ids] += tally.counts
        for name in sizes:
            sizes[name] += getattr(tally, name)
        tell(piece.file_bytes)
    if not counts_V.any():
        named = ", ".join(str(given.path) for given in inputs)
        raise ConfigError(f"empty corpus: {sizes['documents']} documents and no token in {named}")
    return Counts(counts_V=counts_V, tokenizer_digest=counter.vocabulary.digest, **sizes)
