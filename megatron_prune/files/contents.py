"""What a file is by its first bytes, where its name or a flag said something else."""

from __future__ import annotations

from pathlib import Path

_DOWNLOAD = "download it again, with a token if the model wants one"
_ARCHIVE = b"PK\x03\x04"
_Table = tuple[tuple[bytes, str], ...]
_ANY: _Table = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file; run 'git lfs pull' there"),
    (b"GGUF", "a GGUF model of llama.cpp; give the Hugging Face directory that it was made of"),
    (b"<!", f"a web page, not the file; {_DOWNLOAD}"),
    (b"<html", f"a web page, not the file; {_DOWNLOAD}"),
    (b"\x1f\x8b", "packed with gzip; unpack it"),
    (b"\x28\xb5\x2f\xfd", "packed with zstd; unpack it"),
    (b"\x93NUMPY", "a numpy array"),
)
_WEIGHTS: _Table = (
    *_ANY,
    (b"\x80\x02", "in torch's format before 1.6; torch.load it and torch.save it again"),
)
_TEXT: _Table = (
    *_ANY,
    (_ARCHIVE, "an archive: a file of torch.save or numpy, or a zip"),
    (b"\x80", "a pickle, which is not loaded"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"%PDF", "a PDF"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xfe", "text in UTF-16; save it as UTF-8"),
    (b"\xfe\xff", "text in UTF-16; save it as UTF-8"),
    (b"\x7fELF", "a program"),
)


def foreign_content(path: Path) -> str | None:
    """What a file of weights really is, and what to do; None where its first bytes do not tell.

    Raises:
        OSError: it cannot be read.
    """
    return _told_by(_start(path), _WEIGHTS)


def foreign_text(path: Path) -> str | None:
    """What a file that should hold text is; None where its first bytes do not tell.

    Raises:
        OSError: it cannot be read.
    """
    start = _start(path)
    if _is_safetensors(start):
        return "is a safetensors file, of weights or scores"
    return _told_by(start, _TEXT)


def no_safetensors(path: Path) -> str | None:
    """What a file is that should be one of safetensors; None where it begins like one.

    Raises:
        OSError: it cannot be read.
    """
    if _is_safetensors(_start(path)):
        return None
    return foreign_text(path) or "does not begin as a safetensors file does"


def no_archive(path: Path) -> str | None:
    """What a file is that should be an archive of numpy; None where it begins like one.

    Raises:
        OSError: it cannot be read.
    """
    if _start(path).startswith(_ARCHIVE):
        return None
    return foreign_text(path) or "does not begin as an archive of numpy does"


def _is_safetensors(start: bytes) -> bool:
    return start[6:9] == b"\0\0{"  # behind eight bytes for the length of its header


def _start(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(32)


def _told_by(start: bytes, table: _Table) -> str | None:
    return next((f"is {what}" for begins, what in table if start.startswith(begins)), None)
