"""The text of a kernel before compilation: what is generated, with the files of `kernels/` in line.

The kernels include no header of the CUDA toolkit. They reach the hardware only through `kernels/ptx/`, one instruction
a function.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

KERNELS = Path(__file__).parent / "kernels"
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.MULTILINE)


@dataclass(frozen=True)
class Source:
    """A translation unit with one `kernel` entry. `name` is for people: messages, profiles, the gate's table."""

    name: str
    text: str


@lru_cache(maxsize=64)
def _file(name: str) -> str:
    return (KERNELS / name).read_text(encoding="utf-8")


def expand(text: str, instead: Callable[[str], str | None] = lambda name: None) -> str:
    """`text` with every quoted include of `kernels/` in line, each file once, at its first mention. `instead` may give
    another text for a file."""
    seen: set[str] = set()

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        text = instead(name)
        return _INCLUDE.sub(replace, _file(name) if text is None else text)

    return _INCLUDE.sub(replace, text)
