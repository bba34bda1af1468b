"""Which bytes of a plan's steps a cache can still hold when they are touched again.

For the roofline: what comes out of a cache is no load on memory. Called by the targets, and by benchmarks for floors.
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.plan.plan import Plan, Step
from engine.plan.tensor import Buffer, BufferKind


def cached_bytes(plan: Plan, cache_bytes: int) -> tuple[int, ...]:
    """Of each step's bytes, in plan order, those that can lie in a cache of `cache_bytes` in a plan that runs again and
    again.

    A buffer can where not more than the cache was touched since it was last: by an earlier step, by the run before (a
    weight of a model that is larger than the cache cannot), by the caller who wrote the inputs just now. A result that
    fits the cache need not reach memory before it is read.
    """
    touched = [_touched(step) for step in plan.steps]
    sizes: dict[Buffer, int] = {}
    for buffer, nbytes in (pair for step in touched for pair in step.items()):
        sizes[buffer] = max(sizes.get(buffer, 0), nbytes)
    if sum(sizes.values()) <= cache_bytes:
        return tuple(step.cost.bytes for step in plan.steps)
    before = _running_sums(step.cost.bytes for step in plan.steps)  # bytes touched before each step, and in all
    # Where the bytes touched stood after the last use of a buffer; the run before counts up to zero.
    last = {buffer: 0 for buffer in sizes if buffer.kind is BufferKind.INPUT}
    for i, buffers in enumerate(touched):
        last |= {buffer: before[i + 1] - before[-1] for buffer in buffers if _stays(buffer)}
    found = []
    for i, (step, buffers) in enumerate(zip(plan.steps, touched, strict=True)):
        near = 0
        for buffer, nbytes in buffers.items():
            since = before[i] - last.get(buffer, before[i])
            near += nbytes if since + nbytes <= cache_bytes else 0
        found.append(step.cost.bytes * near // max(1, sum(buffers.values())))
        last |= dict.fromkeys(buffers, before[i + 1])
    return tuple(found)


def _touched(step: Step) -> dict[Buffer, int]:
    """Bytes of the windows that a step has on each buffer; not more than it touches in all (a lookup in a table touches
    a part)."""
    windows: dict[Buffer, int] = {}
    for tensor in (*step.inputs, *step.outputs):
        windows[tensor.buffer] = min(windows.get(tensor.buffer, 0) + tensor.nbytes, step.cost.bytes)
    return windows


def _stays(buffer: Buffer) -> bool:
    """Whether the content is the same in the next run."""
    return buffer.kind in (BufferKind.CONSTANT, BufferKind.PLAN)


def _running_sums(values: Iterable[int]) -> list[int]:
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
