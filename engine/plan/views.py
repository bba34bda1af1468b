"""View operators on concrete tensors: the same buffer with other shape, strides and offset. Called by the plan
builder."""

from __future__ import annotations

from dataclasses import replace

from engine.errors import ShapeError
from engine.ir.ops import Expand, Reshape, Slice, Transpose, View
from engine.plan.tensor import Tensor, broadcast_to


def apply_view(op: View, tensor: Tensor) -> Tensor | None:
    """The result of a (concrete) view operator as a window on the operand's buffer; None where strides cannot say it.

    Raises ShapeError where the sizes do not allow the view.
    """
    match op:
        case Transpose(perm):
            return replace(
                tensor,
                shape=tuple(tensor.shape[axis] for axis in perm),
                strides=tuple(tensor.strides[axis] for axis in perm),
            )
        case Slice(starts, sizes, steps):
            return _slice(tensor, _ints(starts), _ints(sizes), steps)
        case Expand(shape):
            try:
                return broadcast_to(tensor, _ints(shape))
            except ValueError as error:
                raise ShapeError(f"Expand: {error}") from None
        case Reshape(shape):
            return reshape(tensor, _ints(shape))
    raise TypeError(f"{op.name} is not a view the plan knows")


def _ints(dims: tuple[object, ...]) -> tuple[int, ...]:
    assert all(isinstance(dim, int) for dim in dims), f"{dims} is not concrete"
    return dims  # type: ignore[return-value]


def _slice(tensor: Tensor, starts: tuple[int, ...], sizes: tuple[int, ...], steps: tuple[int, ...]) -> Tensor:
    offset = tensor.offset
    for axis, (size, start, length, step) in enumerate(zip(tensor.shape, starts, sizes, steps, strict=True)):
        last = start + (length - 1) * step
        if length < 0 or (length and not (0 <= start < size and 0 <= last < size)):
            raise ShapeError(f"Slice: elements {start}…{last} of axis {axis}, which has {size}")
        offset += start * tensor.strides[axis] if length else 0
    strides = tuple(stride * step for stride, step in zip(tensor.strides, steps, strict=True))
    return replace(tensor, shape=sizes, strides=strides, offset=offset)


def reshape(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    """`tensor` in another shape without moving an element, or None where that is impossible.

    Axes of both shapes are matched in groups of equal element count; inside a group the old axes must lie without
    gaps, so that any split of them is again a stride (the rule NumPy's reshape uses).
    """
    if not tensor.elements:
        return replace(tensor, shape=shape, strides=(0,) * len(shape))
    old = [(size, stride) for size, stride in zip(tensor.shape, tensor.strides, strict=True) if size != 1]
    strides = [0] * len(shape)
    i = 0  # next old axis
    j = 0  # next new axis
    while j < len(shape):
        if shape[j] == 1:
            j += 1
            continue
        first_new, group_new = j, shape[j]
        if i >= len(old):
            return None
        first_old, group_old = i, old[i][0]
        while group_new != group_old:
            if group_new < group_old:
                j += 1
                if j >= len(shape):
                    return None
                group_new *= shape[j]
            else:
                i += 1
                if i >= len(old):
                    return None
                group_old *= old[i][0]
        for (_, outer), (size, inner) in zip(old[first_old:i], old[first_old + 1 : i + 1], strict=True):
            if outer != size * inner:
                return None
        step = old[i][1]
        for axis in range(j, first_new - 1, -1):
            strides[axis] = step
            step *= shape[axis]
        i, j = i + 1, j + 1
    return replace(tensor, shape=shape, strides=tuple(strides))
