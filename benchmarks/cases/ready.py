"""How long the HTTP server takes from its start until it answers, with both default models."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar


class Cache(Enum):
    """What is there of compiled kernels and verdicts from an earlier start."""

    EMPTY = "empty"
    WARM = "warm"


@dataclass(frozen=True)
class ReadyCase:
    """`device` is what the server is told."""

    device: str
    cache: Cache
    suite: ClassVar[str] = "ready"

    @property
    def name(self) -> str:
        return f"{self.device}, caches {self.cache.value}"


# The first start fills the caches for the second.
GPU_CASES = tuple(ReadyCase("cuda", cache) for cache in Cache)
CPU_CASES = tuple(ReadyCase("cpu", cache) for cache in Cache)
