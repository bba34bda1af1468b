"""Padding in all modes, negative pads too: the output is cut into boxes, each a strided copy of the input or constant.

Along each axis, the source index as a function of the output index is computed once and cut into segments in which it
is constant or moves by a fixed step: reflection is a segment that walks backwards, an edge one that stands still.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import ShapeError
from engine.ir import expr as ex
from engine.ir.ops import Op, Pad, PadMode
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cpu.kernel import Context, Launch
from engine.targets.cpu.pointwise import copy_launches
from engine.targets.cpu.spaces import operand

_OUTSIDE = -1


@dataclass(frozen=True)
class Segment:
    """`size` output elements from `start`; they read the source from `source` on in steps of `step`, or nothing."""

    start: int
    size: int
    source: int | None
    step: int


def segments(size: int, begin: int, end: int, mode: PadMode) -> list[Segment]:
    """The segments of one axis of `size` elements padded by `begin` and `end`."""
    if mode is PadMode.CONSTANT:
        index = np.arange(-begin, size + end)
        index[(index < 0) | (index >= size)] = _OUTSIDE
    elif mode is PadMode.ROLL:
        index = np.roll(np.arange(size), begin)
    else:
        kept = np.arange(size)[max(0, -begin) : size - max(0, -end)]
        names = {PadMode.REFLECT: "reflect", PadMode.EDGE: "edge", PadMode.WRAP: "wrap"}
        index = np.pad(kept, (max(0, begin), max(0, end)), mode=names[mode])  # type: ignore[call-overload]
    return list(_runs([int(i) for i in index]))


def _runs(index: list[int]) -> Iterator[Segment]:
    start = 0
    while start < len(index):
        stop = start + 1
        if index[start] == _OUTSIDE:
            while stop < len(index) and index[stop] == _OUTSIDE:
                stop += 1
            yield Segment(start, stop - start, None, 0)
        else:
            step = index[stop] - index[start] if stop < len(index) and index[stop] != _OUTSIDE else 1
            if abs(step) > 1:
                step = 1
            while stop < len(index) and index[stop] != _OUTSIDE and index[stop] - index[stop - 1] == step:
                stop += 1
            yield Segment(start, stop - start, index[start], step)
        start = stop


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Pad)
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, output, source = step.op, step.outputs[0], step.inputs[0]
    assert isinstance(op, Pad)
    if not output.elements:
        return []
    if not source.elements and op.mode is not PadMode.CONSTANT:
        raise ShapeError(f"{step.name}: an empty tensor has nothing to {op.mode.value}")
    axes = [segments(size, *pads, op.mode) for size, pads in zip(source.shape, op.pads, strict=True)]
    launches: list[Launch] = []
    for box in _boxes(axes):
        target = _window(output, [s.start for s in box], [s.size for s in box], [1] * len(box))
        if any(s.source is None for s in box):
            value = ex.const(op.value, output.dtype)
            launches += copy_launches(target, None, context, value=value, concurrent=bool(launches))
        else:
            window = _window(source, [s.source or 0 for s in box], [s.size for s in box], [s.step for s in box])
            launches += copy_launches(target, operand(window, len(box)), context, concurrent=bool(launches))
    return launches


def _boxes(axes: list[list[Segment]]) -> Iterator[tuple[Segment, ...]]:
    """All boxes; those that lie outside along one axis are not cut further along the later ones."""
    if not axes:
        yield ()
        return
    whole = [Segment(0, sum(s.size for s in axis), 0, 1) for axis in axes[1:]]
    for segment in axes[0]:
        if segment.source is None:
            yield (segment, *whole)
        else:
            yield from ((segment, *rest) for rest in _boxes(axes[1:]))


def _window(tensor: Tensor, starts: list[int], sizes: list[int], steps: list[int]) -> Tensor:
    offset = tensor.offset + sum(start * stride for start, stride in zip(starts, tensor.strides, strict=True))
    strides = tuple(stride * step for stride, step in zip(tensor.strides, steps, strict=True))
    return replace(tensor, shape=tuple(sizes), strides=strides, offset=offset)
