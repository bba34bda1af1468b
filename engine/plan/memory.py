"""Static memory planning: every intermediate gets a fixed place in one arena, buffers that never live together share
it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.plan.tensor import Buffer

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of any CPU target
SLACK = 64  # bytes after each buffer, so that a kernel may read (never write) one vector past the last element


@dataclass(frozen=True)
class Lifetime:
    """The buffer is written first by step `first` and read last by step `last` (both included)."""

    buffer: Buffer
    first: int
    last: int


def assign_offsets(lifetimes: Sequence[Lifetime]) -> tuple[int, int]:
    """Set `offset` of every buffer. Returns (bytes of the arena, sum of all buffers).

    Greedy by size (Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net Inference"): the largest
    buffer first, each into the smallest gap between the buffers already placed whose lifetimes overlap its own.
    """
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end, lifetime), ascending by offset
    arena = total = 0
    for lifetime in sorted(lifetimes, key=lambda item: (-item.buffer.nbytes, item.first)):
        size = padded(lifetime.buffer.nbytes)
        total += size
        best: tuple[int, int] | None = None  # (gap, offset)
        cursor = 0
        for offset, end, other in placed:
            if other.last < lifetime.first or lifetime.last < other.first:
                continue
            gap = offset - cursor
            if gap >= size and (best is None or gap < best[0]):
                best = (gap, cursor)
            cursor = max(cursor, end)
        start = best[1] if best is not None else cursor
        lifetime.buffer.offset = start
        arena = max(arena, start + size)
        placed.append((start, start + size, lifetime))
        placed.sort(key=lambda item: item[0])
    return arena, total


def padded(nbytes: int) -> int:
    """`nbytes` with slack, rounded up to the alignment."""
    return -(-(nbytes + SLACK) // ALIGNMENT) * ALIGNMENT
