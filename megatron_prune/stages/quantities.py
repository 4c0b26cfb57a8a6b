"""Numbers with units on the command line: parameters, memory, time."""

from __future__ import annotations

import math
import re

from megatron_prune.errors import ConfigError

_NUMBER = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z%]*)")
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTES = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def _parse(text: str, units: dict[str, float], flag: str, wanted: str) -> float:
    match = _NUMBER.fullmatch(text.strip())
    factor = None if match is None else units.get(match[2].upper())
    try:
        value = math.nan if match is None or factor is None else float(match[1]) * factor
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{flag} {text!r}: wanted {wanted}")
    return value


def parse_parameters(text: str) -> float:
    """``3.4e9``, ``3.4B`` or ``500M``.

    Raises:
        ConfigError: not a number above 0.
    """
    units = {unit: float(factor) for unit, factor in _COUNTS.items()}
    return _parse(text, units, "--target-params", "a number such as 3.4e9, 3.4B or 500M")


def parse_memory(text: str) -> float:
    """``8GiB`` or ``1.5GB`` -> bytes.

    Raises:
        ConfigError: not a size above 0, or one without a unit.
    """
    units = {unit: float(factor) for unit, factor in _BYTES.items()}
    return _parse(text, units, "--target-memory", "a size such as 8GiB or 1.5GB")


def parse_latency(text: str) -> tuple[float, bool]:
    """``20ms`` -> (0.02, False), seconds; ``60%`` -> (0.6, True), a share of the source's.

    Raises:
        ConfigError: neither.
    """
    units = {"MS": 1e-3, "S": 1.0, "%": 1e-2}
    value = _parse(text, units, "--target-latency", "a time such as 20ms, or 60% of the source's")
    return value, text.strip().endswith("%")


def parse_weights(text: str) -> dict[str, float]:
    """``hidden=2,ffn=0.5`` -> {"hidden": 2.0, "ffn": 0.5}; their names are checked by their user.

    Raises:
        ConfigError: not of that form.
    """
    found = {}
    for word in text.split(","):
        name, equals, value = word.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"--proxy-weights {text!r}: wanted such as hidden=2,ffn=0.5")
    return found
