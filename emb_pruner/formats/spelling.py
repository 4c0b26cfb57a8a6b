"""How a vocabulary's strings spell text: byte-level characters, ``▁`` for a space, ``<0x0A>``."""

from __future__ import annotations

import re
from functools import cache

SPACE = "▁"
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Where no token reaches over the start of a word, words are tokenised each by itself.
WORDS = re.compile(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+")
_ACROSS_WORDS = re.compile(f"[^{SPACE}]{SPACE}")


@cache
def byte_letters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level vocabularies.

    OpenAI's `bytes_to_unicode` of GPT-2: printable bytes as they are, others from U+0100 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in set(printable))
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(256 + place) for place, byte in enumerate(others)}


@cache
def letter_bytes() -> dict[str, int]:
    """The other way round."""
    return {letter: byte for byte, letter in byte_letters().items()}


def to_letters(token: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them."""
    return "".join(map(byte_letters().__getitem__, token))


def bytes_of(token: str) -> bytes | None:
    """The bytes of a byte-level token; None where it has a letter that stands for no byte."""
    found = [letter_bytes().get(letter) for letter in token]
    return None if None in found else bytes(byte for byte in found if byte is not None)


def byte_level_text(token: str) -> str | None:
    """The text of a byte-level token; None where it alone is not UTF-8."""
    found = bytes_of(token)
    try:
        return None if found is None else found.decode()
    except UnicodeDecodeError:
        return None


def crosses_words(token: str) -> bool:
    """A word starts inside of the token."""
    return _ACROSS_WORDS.search(token) is not None
