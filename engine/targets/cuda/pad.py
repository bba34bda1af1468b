"""Padding in all modes (pad.cuh). Axes that are not padded merge with their neighbours, and elements into units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from engine.errors import ShapeError
from engine.ir.dtype import DType
from engine.ir.ops import Op, Pad, PadMode
from engine.plan.plan import Requirement, Step
from engine.plan.tensor import Tensor
from engine.targets.cuda.kernel import Argument, Context, I64s, Launch, Pointer, ceildiv, launch
from engine.targets.cuda.units import UNITS, elements_in_unit

_THREADS = 256
_BLOCKS_PER_MULTIPROCESSOR = 8


@dataclass(frozen=True)
class _Axis:
    """`size` indices of the result, of which number `begin` reads the source's first of `source_size`."""

    size: int
    begin: int
    source_size: int
    source_stride: int
    stride: int

    @property
    def is_whole(self) -> bool:
        """Whether result and source are the same along it."""
        return self.begin == 0 and self.size == self.source_size


_WHOLE = (PadMode.CONSTANT, PadMode.ROLL)
"""The modes in which the kernel may see what is cropped."""


def requirements(op: Op, inputs: tuple[Tensor, ...]) -> tuple[tuple[Requirement, ...], tuple[Requirement, ...]]:
    """Any strides."""
    assert isinstance(op, Pad)
    return (Requirement(),) * len(inputs), (Requirement(),)


def lower(step: Step, context: Context) -> list[Launch]:
    op, source, output = step.op, step.inputs[0], step.outputs[0]
    assert isinstance(op, Pad)
    # What negative pads take away is gone before the rest is padded; a constant needs no such care.
    crops = [0 if op.mode in _WHOLE else max(0, -begin) for begin, _ in op.pads]
    axes = list(_axes(op, source, output, crops))
    if op.mode is not PadMode.CONSTANT and any(axis.source_size <= 0 for axis in axes):
        raise ShapeError(f"{step.name}: an empty tensor has nothing to {op.mode.value}")
    start = source.offset + sum(crop * stride for crop, stride in zip(crops, source.strides, strict=True))
    axes = _merged(sorted(axes, key=lambda axis: -abs(axis.stride)))
    unit = _unit(axes, source.dtype, (start, output.offset))
    axes = _in_units(axes, unit)
    itemsize = source.dtype.itemsize
    x = Pointer(source.buffer, start * itemsize, UNITS[unit * itemsize])
    y = Pointer(output.buffer, output.offset * itemsize, UNITS[unit * itemsize])
    elements = output.elements // unit
    mode = PadMode.WRAP if op.mode is PadMode.ROLL else op.mode
    config: dict[str, int | bool | str] = {
        "threads": _THREADS, "axes": len(axes), "mode": list(PadMode).index(mode), "element": x.ctype,
    }  # fmt: skip
    arguments: dict[str, Argument] = {
        "x": x, "y": y, "elements": elements, "sizes": I64s(tuple(axis.size for axis in axes)),
        "begins": I64s(tuple(axis.begin for axis in axes)),
        "source_sizes": I64s(tuple(axis.source_size for axis in axes)),
        "source_strides": I64s(tuple(axis.source_stride for axis in axes)),
        "strides": I64s(tuple(axis.stride for axis in axes)), "fill": I64s(_repeated(op, source.dtype)),
    }  # fmt: skip
    grid = min(ceildiv(elements, _THREADS), context.multiprocessors * _BLOCKS_PER_MULTIPROCESSOR)
    return [launch("pad", "pad.cuh", config, [], arguments, (grid, 1, 1), _THREADS)]


def _axes(op: Pad, source: Tensor, output: Tensor, crops: list[int]) -> Iterator[_Axis]:
    for axis, ((begin, end), crop) in enumerate(zip(op.pads, crops, strict=True)):
        kept = source.shape[axis] - (0 if op.mode in _WHOLE else crop + max(0, -end))
        yield _Axis(output.shape[axis], begin + crop, kept, source.strides[axis], output.strides[axis])


def _merged(axes: list[_Axis]) -> list[_Axis]:
    """Neighbouring axes that are copied whole and lie together as one; at least one axis."""
    result: list[_Axis] = []
    for axis in axes:
        if axis.is_whole and axis.size == 1:
            continue
        last = result[-1] if result else None
        together = last is not None and (
            last.source_stride == axis.source_stride * axis.size and last.stride == axis.stride * axis.size
        )
        if last is not None and last.is_whole and axis.is_whole and together:
            size = last.size * axis.size
            result[-1] = _Axis(size, 0, size, axis.source_stride, axis.stride)
        else:
            result.append(axis)
    return result or [_Axis(1, 0, 1, 1, 1)]


def _unit(axes: list[_Axis], dtype: DType, offsets: tuple[int, int]) -> int:
    """How many elements can always be moved at once."""
    inner, strides = axes[-1], [stride for axis in axes[:-1] for stride in (axis.source_stride, axis.stride)]
    if not inner.is_whole or inner.source_stride != 1 or inner.stride != 1:
        return 1
    return elements_in_unit(dtype, (inner.size, *offsets, *strides))


def _in_units(axes: list[_Axis], unit: int) -> list[_Axis]:
    if unit == 1:
        return axes
    outer = [replace(a, source_stride=a.source_stride // unit, stride=a.stride // unit) for a in axes[:-1]]
    inner = axes[-1]
    return [*outer, replace(inner, size=inner.size // unit, source_size=inner.source_size // unit)]


def _repeated(op: Pad, dtype: DType) -> tuple[int, ...]:
    """The constant, over and over in 16 bytes, as two integers."""
    value = op.value if op.mode is PadMode.CONSTANT else 0
    one = np.asarray(value).astype(dtype.numpy).tobytes()
    return tuple(int(word) for word in np.frombuffer(one * (16 // len(one)), np.int64))
