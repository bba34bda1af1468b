"""The arena: buffers that live at the same time never overlap, and memory is reused."""

from __future__ import annotations

import numpy as np
import pytest

from engine.plan.memory import ALIGNMENT, Lifetime, assign_offsets
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
    assert arena <= total
    for i, a in enumerate(items):
        assert a.buffer.offset % ALIGNMENT == 0
        assert a.buffer.offset + a.buffer.nbytes <= arena
        for b in items[:i]:
            if a.first <= b.last and b.first <= a.last:
                ends = (a.buffer.offset + a.buffer.nbytes, b.buffer.offset + b.buffer.nbytes)
                assert ends[0] <= b.buffer.offset or ends[1] <= a.buffer.offset


def test_a_chain_needs_two_buffers_only() -> None:
    items = [lifetime(1000, i, i + 1) for i in range(30)]
    arena, total = assign_offsets(items)
    assert arena == total / 30 * 2
