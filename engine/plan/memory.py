"""Static memory planning: every intermediate gets a fixed place in one arena, buffers that never live together share
it."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.plan.tensor import Buffer

ALIGNMENT = 64  # bytes: a cache line, and the widest vector of any CPU target
SLACK = 64  # bytes at the arena's end: a kernel may read (never write) one vector past the last element of a buffer


@dataclass(frozen=True)
class Lifetime:
    """The buffer is written first by step `first` and read last by step `last` (both included)."""

    buffer: Buffer
    first: int
    last: int


def assign_offsets(lifetimes: Sequence[Lifetime]) -> tuple[int, int]:
    """Set `offset` of every buffer. Returns (bytes of the arena, sum of all buffers).

    Greedy (Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net Inference"): one buffer after the
    other into the smallest gap between those already placed whose lifetimes overlap its own. Several orders are tried,
    until no arena could be smaller.
    """
    least = peak(lifetimes)
    best, arena = _placed(sorted(lifetimes, key=_ORDERS[0]))
    for order in _ORDERS[1:]:
        if arena == least:
            break
        offsets, size = _placed(sorted(lifetimes, key=order))
        if size < arena:
            best, arena = offsets, size
    for lifetime, offset in best:
        lifetime.buffer.offset = offset
    slack = SLACK if best else 0
    return arena + slack, sum(aligned(lifetime.buffer.nbytes) for lifetime in lifetimes) + slack


_ORDERS: tuple[Callable[[Lifetime], tuple[int, ...]], ...] = (
    lambda item: (-item.buffer.nbytes, item.first),
    # Among equals those that live longest: what a residual block adds at its end lies beside all that is in between.
    lambda item: (-item.buffer.nbytes, item.first - item.last, item.first),
    lambda item: (-item.buffer.nbytes * (item.last - item.first + 1), item.first),
    lambda item: (item.first, -item.buffer.nbytes),
)


def peak(lifetimes: Sequence[Lifetime]) -> int:
    """The bytes that live at once at most: no arena can be smaller."""
    changes: dict[int, int] = {}
    for lifetime in lifetimes:
        size = aligned(lifetime.buffer.nbytes)
        changes[lifetime.first] = changes.get(lifetime.first, 0) + size
        changes[lifetime.last + 1] = changes.get(lifetime.last + 1, 0) - size
    live = most = 0
    for step in sorted(changes):
        live += changes[step]
        most = max(most, live)
    return most


def _placed(ordered: Sequence[Lifetime]) -> tuple[list[tuple[Lifetime, int]], int]:
    """Buffers with their offsets, placed in the order given, and the bytes that they take."""
    placed: list[tuple[int, int, Lifetime]] = []  # (offset, end, lifetime), ascending by offset
    arena = 0
    for lifetime in ordered:
        size = aligned(lifetime.buffer.nbytes)
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
        arena = max(arena, start + size)
        insort(placed, (start, start + size, lifetime), key=lambda item: item[0])
    return [(lifetime, offset) for offset, _, lifetime in placed], arena


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to the alignment. Nothing lies between buffers: what a kernel reads past one of them it does
    not use, so it may be another's; and buffers of the sizes that layers repeat fit each other's gaps."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
