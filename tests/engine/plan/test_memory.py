"""The arena: buffers that live at the same time never overlap, and memory is reused."""

from __future__ import annotations

import numpy as np
import pytest

from engine.plan.memory import ALIGNMENT, SLACK, Lifetime, assign_offsets, peak
from engine.plan.tensor import Buffer, BufferKind


def lifetime(nbytes: int, first: int, last: int) -> Lifetime:
    return Lifetime(Buffer("b", BufferKind.ARENA, nbytes), first, last)


@pytest.mark.parametrize("seed", range(20))
def test_buffers_alive_together_do_not_overlap(seed: int) -> None:
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(60):
        first = int(rng.integers(0, 50))
        items.append(lifetime(int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 10))))
    arena, total = assign_offsets(items)
    assert peak(items) + SLACK <= arena <= total
    for i, a in enumerate(items):
        assert a.buffer.offset % ALIGNMENT == 0
        assert a.buffer.offset + a.buffer.nbytes <= arena
        for b in items[:i]:
            if a.first <= b.last and b.first <= a.last:
                ends = (a.buffer.offset + a.buffer.nbytes, b.buffer.offset + b.buffer.nbytes)
                assert ends[0] <= b.buffer.offset or ends[1] <= a.buffer.offset


def test_a_chain_needs_two_buffers_only() -> None:
    items = [lifetime(1000, i, i + 1) for i in range(30)]
    assert assign_offsets(items) == (2 * 1024 + SLACK, 30 * 1024 + SLACK)


def pre_norm_blocks(count: int, unit: int) -> list[Lifetime]:
    """Norm, Q K V, attention, projection and sum, norm, two layers: as in ViT and GPT-2."""
    items = [lifetime(unit, 0, 4)]
    for block in range(count):
        at = 7 * block + 1
        sizes = ((1, 0, 1), (3, 1, 2), (1, 2, 3), (1, 3, 6), (1, 4, 5), (4, 5, 6), (1, 6, 10))
        items += [lifetime(times * unit, at + first, at + last) for times, first, last in sizes]
    return items


def test_transformer_blocks_take_what_lives_at_once_and_no_more() -> None:
    items = pre_norm_blocks(12, 197 * 768 * 2)
    arena, _ = assign_offsets(items)
    assert arena == peak(items) + SLACK == 6 * 197 * 768 * 2 + SLACK


def test_nothing_takes_nothing() -> None:
    assert assign_offsets([]) == (0, 0)
