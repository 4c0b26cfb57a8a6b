"""Text to evaluate on, as windows of tokens, and the bytes their scored tokens stand for.

The rule: the text is tokenised once, in one piece, without special tokens; windows do not overlap;
the last, partial one is dropped; in each window all tokens but the first are scored. Cutting the
text first would change the ids at the cuts, so it is never done: tokenising needs about 240 bytes
of memory a token, and the text as a string.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import torch
from torch import Tensor

from megatron_prune.data.corpus import check_inputs, parse_lines, read_chunks
from megatron_prune.data.tokenizers import TextTokenizer, load_tokenizer
from megatron_prune.errors import ConfigError
from megatron_prune.files.contents import foreign_text


def data_digest(windows_WS: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(windows_WS.numpy().tobytes()).hexdigest()


def read_documents(path: str | Path) -> list[str]:
    """The texts of JSON lines, one each; any other file is one text.

    JSON lines are known by their name: ``.jsonl``, ``.json``, ``.jsonl.gz``.

    Raises:
        ConfigError: missing, not UTF-8, or a line that ``preprocess`` would refuse too.
    """
    path = Path(path)
    check_inputs([path], flag="")
    if {".jsonl", ".json"} & set(path.suffixes):
        return [
            row[0]
            for chunk in read_chunks([path])
            for row in parse_lines(chunk, ["text"], "wanted 'text'; rename one of them")
        ]
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError as error:
        what = foreign_text(path) or f"not UTF-8 text ({error.reason} at byte {error.start})"
        raise ConfigError(f"{path}: {what}") from None


def read_text(path: str | Path) -> str:
    """`read_documents` joined by line ends."""
    return "\n".join(read_documents(path))


def token_windows(
    tokenizer: TextTokenizer,
    text: str,
    seq_length: int,
    max_windows: int | None = None,
    name: str = "the text",
) -> Tensor:
    """The first windows of ``text``, which messages call ``name``.

    Returns:
        [windows, seq_length] int64; at most ``max_windows`` of them.

    Raises:
        ConfigError: the text is shorter than one window, or nothing of a window would be scored.
    """
    if seq_length < 2:
        raise ConfigError(
            f"--seq-length {seq_length}: a window scores all tokens but its first; wanted 2 or more"
        )
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"--max-windows {max_windows}: wanted 1 or more")
    ids = torch.tensor(tokenizer.encode(text, False), dtype=torch.int64)
    windows = len(ids) // seq_length
    if windows == 0:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, one window takes {seq_length}; give more text or a "
            "smaller --seq-length"
        )
    return ids[: windows * seq_length].view(windows, seq_length)[:max_windows]


def model_windows(
    data: Path,
    tokenizer_model: Path,
    *,
    seq_length: int,
    max_windows: int | None,
    vocab_size: int,
) -> tuple[Tensor, TextTokenizer]:
    """The first windows of a file, for a model of ``vocab_size``, and the tokenizer.

    Raises:
        ConfigError: no such text, less of it than one window, or a tokenizer of another model.
    """
    tokenizer = load_tokenizer(tokenizer_model)
    windows = token_windows(tokenizer, read_text(data), seq_length, max_windows, str(data))
    _check_ids(windows, tokenizer, vocab_size)
    return windows, tokenizer


def document_windows(
    data: Path, tokenizer_model: Path, *, seq_length: int, count: int, seed: int, vocab_size: int
) -> Tensor:
    """Windows drawn from documents as the official codes of SparseGPT and Wanda draw them.

    Python's generator is seeded; a document is drawn until one has more tokens than a window,
    special tokens of the tokenizer's among them; then the place where the window begins.

    Returns:
        [count, seq_length] int64.

    Raises:
        ConfigError: see `model_windows`; or no document is longer than a window.
    """
    documents, tokenizer = read_documents(data), load_tokenizer(tokenizer_model)
    draws, rows = random.Random(seed), list[list[int]]()
    drawn = dict[int, list[int]]()  # once each: a text file is one document, drawn for every window
    while len(rows) < count:
        if len(drawn) == len(documents) and not rows:
            raise ConfigError(
                f"{data}: none of {len(documents)} documents has more than {seq_length} tokens, "
                "which --calibration-sampling documents needs for one window; give longer ones or "
                "a smaller --seq-length"
            )
        number = draws.randint(0, len(documents) - 1)
        if number not in drawn:
            drawn[number] = tokenizer.encode(documents[number], True)
        if len(ids := drawn[number]) <= seq_length:
            continue
        start = draws.randint(0, len(ids) - seq_length - 1)
        rows.append(ids[start : start + seq_length])
    windows = torch.tensor(rows, dtype=torch.int64)
    _check_ids(windows, tokenizer, vocab_size)
    return windows


def _check_ids(windows: Tensor, tokenizer: TextTokenizer, vocab_size: int) -> None:
    largest = int(windows.max())
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer of {tokenizer.name} gives token id {largest}, the model has a "
            f"vocabulary of {vocab_size}; name its own with --tokenizer-model"
        )


def scored_bytes(tokenizer: TextTokenizer, windows: Tensor) -> int:
    """UTF-8 bytes of what the scored tokens, ``windows[:, 1:]``, decode to, window by window.

    A character cut by a window's edge decodes to U+FFFD, which counts as three bytes.
    """
    return sum(len(tokenizer.decode(ids).encode()) for ids in windows[:, 1:].tolist())
