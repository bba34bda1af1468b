"""Integer tensors whose elements follow from their position: ranges, and what is computed from ranges.

Exporters build masks and position ids from `Range`, broadcasting and comparisons, and then look them up by index. A
*grid* says such a tensor in one expression: a number, or a `Dim` in which the symbol ``@i`` is the position along axis
i. With it a lookup by consecutive positions turns into a view, and a comparison that always holds into a constant.
The builder computes grids as it adds nodes; `operators/indexing.py` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.frontend.bounds import complexity
from engine.frontend.elements import Element, Ratio, Undecided, apply_elements
from engine.ir import dim as dims
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, Sym, symbol, symbols
from engine.ir.dtype import DType
from engine.ir.graph import Value

_MAX_CONSTANT = 65536  # elements of a constant that is looked at
_MAX_TERMS = 64


def coordinate(axis: int) -> Sym:
    """The position along `axis`."""
    return symbol(f"@{axis}")


def depends_on(grid: Element) -> tuple[int, ...]:
    """The axes along which the elements differ."""
    if not isinstance(grid, Sym):
        return ()
    return tuple(sorted(int(name[1:]) for name in symbols(grid) if name.startswith("@")))


def of_constant(value: Value) -> Element | None:
    """The grid of a constant whose elements are all equal, or count 0, 1, 2, … along one axis; None for others."""
    data = value.data
    if data is None or not 0 < data.size <= _MAX_CONSTANT or value.dtype is DType.STRING:
        return None
    first = data.reshape(-1)[0]
    if (data == first).all():
        return first.item()
    if value.dtype.is_int:
        for axis, size in enumerate(data.shape):
            if size == data.size and (data.reshape(-1) == np.arange(size)).all():
                return coordinate(axis)
    return None


def handles(op: ops.Op) -> bool:
    """Whether `evaluate` knows the operator."""
    return type(op) in _RUNNERS


def evaluate(op: ops.Op, inputs: Sequence[Value], grids: Sequence[Element | None]) -> Element | None:
    """The grid of the op's only result; None where the elements do not follow from their position alone."""
    run = _RUNNERS.get(type(op))
    if run is None or any(grid is None for grid in grids):
        return None
    try:
        result = run(op, inputs, grids)
    except (Undecided, OverflowError, ZeroDivisionError):
        return None
    if isinstance(result, Sym) and complexity(result) > _MAX_TERMS:
        return None
    return result


def enumeration(grid: Element, shape: Sequence[Dim]) -> tuple[Dim, Dim, tuple[int, ...]] | None:
    """(first, count, axes) where the elements count first, first + 1, … in row-major order over `axes` and repeat along
    all others; None where they do not."""
    axes = depends_on(grid)
    if not axes:
        return None
    stride: Dim = 1
    rest: Dim = grid
    for axis in reversed(axes):
        rest = rest - coordinate(axis) * stride
        stride = stride * shape[axis]
    return None if depends_on(rest) else (rest, stride, axes)


def _moved(grid: Element, axes: dict[int, Dim]) -> Element:
    """`grid` with the position along axis i replaced by `axes[i]`."""
    if isinstance(grid, Ratio):
        raise Undecided
    if not isinstance(grid, Sym):
        return grid
    return dims.substitute(grid, {f"@{axis}": replacement for axis, replacement in axes.items()})


def _reshape(op: ops.Reshape, inputs: Sequence[Value], grids: Sequence[Element]) -> Element | None:
    before = [i for i, size in enumerate(inputs[0].shape) if size != 1]
    after = [i for i, size in enumerate(op.shape) if size != 1]
    if not depends_on(grids[0]):
        return grids[0]
    if [inputs[0].shape[i] for i in before] != [op.shape[i] for i in after]:
        return None
    return _moved(grids[0], {old: coordinate(new) for old, new in zip(before, after, strict=True)})


def _transpose(op: ops.Transpose, _inputs: Sequence[Value], grids: Sequence[Element]) -> Element:
    return _moved(grids[0], {old: coordinate(new) for new, old in enumerate(op.perm)})


def _expand(op: ops.Expand, inputs: Sequence[Value], grids: Sequence[Element]) -> Element:
    return _aligned(grids[0], inputs[0].rank, len(op.shape))


def _aligned(grid: Element, rank: int, wanted: int) -> Element:
    return _moved(grid, {axis: coordinate(axis + wanted - rank) for axis in range(rank)})


def _slice(op: ops.Slice, _inputs: Sequence[Value], grids: Sequence[Element]) -> Element:
    moves: dict[int, Dim] = {}
    for axis, (start, step) in enumerate(zip(op.starts, op.steps, strict=True)):
        moves[axis] = start if op.sizes[axis] == 1 else coordinate(axis) * step + start
    return _moved(grids[0], moves)


def _pointwise(op: ops.Pointwise, inputs: Sequence[Value], grids: Sequence[Element]) -> Element | None:
    if op.gathers or len(op.stores) != 1:
        return None
    rank = max(inputs[i].rank for i in ex.arguments(*op.stores))
    return apply_elements(
        op.stores[0], [_aligned(grid, value.rank, rank) for grid, value in zip(grids, inputs, strict=True)]
    )


def _gather(op: ops.Gather, inputs: Sequence[Value], grids: Sequence[Element]) -> Element | None:
    if op.axis or inputs[0].rank != 1:
        return None if depends_on(grids[0]) else grids[0]
    return _moved(grids[0], {0: grids[1]})


_RUNNERS: dict[type[ops.Op], Callable[[Any, Sequence[Value], Sequence[Any]], Element | None]] = {
    ops.ShapeTensor: lambda op, *_: coordinate(0) if op.values is None and op.dtype.is_int else None,
    ops.Reshape: _reshape,
    ops.Transpose: _transpose,
    ops.Expand: _expand,
    ops.Slice: _slice,
    ops.Pointwise: _pointwise,
    ops.Gather: _gather,
}
