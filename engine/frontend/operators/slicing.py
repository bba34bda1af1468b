"""Parts of tensors and tensors from parts: Slice, Split, Concat, Pad."""

from __future__ import annotations

from collections.abc import Sequence

from engine.frontend.bounds import at_least, larger, smaller
from engine.frontend.onnx_node import OnnxNode
from engine.frontend.registry import operator
from engine.ir import ops
from engine.ir.dim import Dim, ceildiv, floordiv
from engine.ir.graph import Value

_INFINITE = 2**31 - 1  # exporters write INT32_MAX or INT64_MAX for "to the end", and their negatives


def take(node: OnnxNode, x: Value, axis: int, start: Dim, size: Dim, step: int = 1) -> Value:
    """`size` elements along one axis."""
    if start == 0 and step == 1 and size == x.shape[axis]:
        return x
    maker = node.builder.maker(x)
    if maker is not None and maker.op == ops.Concat(axis) and step == 1:
        position: Dim = 0
        for part in maker.inputs:  # one of the parts that were just joined
            if position == start and part.shape[axis] == size:
                return part
            position = position + part.shape[axis]
    starts: list[Dim] = [0] * x.rank
    sizes, steps = list(x.shape), [1] * x.rank
    starts[axis], sizes[axis], steps[axis] = start, size, step
    return node.add(ops.Slice(tuple(starts), tuple(sizes), tuple(steps)), x)


@operator("Slice", since=10)
def Slice(
    node: OnnxNode, x: Value, starts: Value, ends: Value, axes: Value | None = None, steps: Value | None = None
) -> Value:
    begin, end = node.dims(starts, "starts"), node.dims(ends, "ends")
    over = node.static_ints(axes, "axes") if axes is not None else range(len(begin))
    step = node.static_ints(steps, "steps") if steps is not None else [1] * len(begin)
    return _slice(node, x, begin, end, over, step)


@operator("Slice")
def Slice_1(node: OnnxNode, x: Value) -> Value:
    begin, end = node.integers("starts"), node.integers("ends")
    return _slice(node, x, begin, end, node.integers("axes", range(len(begin))), [1] * len(begin))


def _slice(
    node: OnnxNode, x: Value, begin: Sequence[Dim], end: Sequence[Dim], axes: Sequence[int], step: Sequence[int]
) -> Value:
    if not len(begin) == len(end) == len(axes) == len(step):
        raise node.invalid("starts, ends, axes and steps differ in length")
    starts: list[Dim] = [0] * x.rank
    sizes, steps = list(x.shape), [1] * x.rank
    node.axes(axes, x.rank)
    for b, e, given, s in zip(begin, end, axes, step, strict=True):
        axis = node.axis(given, x.rank)
        if s == 0:
            raise node.invalid("a step of 0")
        starts[axis], sizes[axis] = slice_range(x.shape[axis], b, e, s)
        steps[axis] = s if sizes[axis] != 1 else 1
    if sizes == list(x.shape) and all(s == 1 for s in steps):
        return x
    return node.add(ops.Slice(tuple(starts), tuple(sizes), tuple(steps)), x)


def slice_range(size: Dim, begin: Dim, end: Dim, step: int) -> tuple[Dim, Dim]:
    """First position and number of elements of Python's `[begin:end:step]` along an axis of `size`."""
    low, high = (0, size) if step > 0 else (-1, size - 1)
    first = _place(begin, size, 0, high)
    last = _place(end, size, low, high)
    count = ceildiv(last - first, step) if step > 0 else ceildiv(first - last, -step)
    count = larger(0, count)
    return (first if count != 0 else 0), count


def _place(bound: Dim, size: Dim, low: int, high: Dim) -> Dim:
    if isinstance(bound, int) and abs(bound) >= _INFINITE:
        return high if bound > 0 else low
    # A symbolic bound whose sign is open (a difference of sizes) is never meant to count from the end.
    if (isinstance(bound, int) and bound < 0) or at_least(-bound, 1):
        return larger(low, bound + size)
    return smaller(bound, high)


@operator("Split")
def Split(node: OnnxNode, x: Value, split: Value | None = None) -> list[Value]:
    axis = node.axis(node.integer("axis", 0), x.rank)
    size, count = x.shape[axis], len(node.outputs)
    parts: list[Dim]
    if split is not None:
        parts = node.dims(split, "split")
    elif node.has("split"):
        parts = list(node.integers("split"))
    else:
        parts = equal_parts(node, size, node.integer("num_outputs", count))
    if len(parts) != count:
        raise node.invalid(f"{len(parts)} parts for {count} outputs")
    return split_at(node, x, axis, parts)


def equal_parts(node: OnnxNode, size: Dim, count: int) -> list[Dim]:
    """`count` parts of the same size, the last one smaller where it does not divide."""
    part = ceildiv(size, count)
    if isinstance(part, int) and isinstance(size, int):
        return [max(0, min(part, size - i * part)) for i in range(count)]
    if part * count != size:
        raise node.unsupported(f"splitting {size} elements into {count} parts")
    return [part] * count


def split_at(node: OnnxNode, x: Value, axis: int, parts: Sequence[Dim]) -> list[Value]:
    """Consecutive parts of `x`."""
    results: list[Value] = []
    start: Dim = 0
    for part in parts:
        if isinstance(part, int) and part < 0:
            raise node.invalid(f"a part of {part} elements")
        results.append(take(node, x, axis, start, part))
        start = start + part
    size = x.shape[axis]
    if isinstance(start, int) and isinstance(size, int) and start != size:
        raise node.invalid(f"parts of {[str(part) for part in parts]} for {size} elements")
    return results


@operator("Concat")
def Concat(node: OnnxNode, *parts: Value) -> Value:
    if not parts:
        raise node.invalid("no inputs")
    return concat(node, parts, node.axis(node.integer("axis"), parts[0].rank))


def concat(node: OnnxNode, parts: Sequence[Value], axis: int) -> Value:
    if len({part.dtype for part in parts}) > 1:
        raise node.invalid("inputs of different types")
    return parts[0] if len(parts) == 1 else node.add(ops.Concat(axis), *parts)


@operator("Pad", since=11)
def Pad(node: OnnxNode, x: Value, pads: Value, value: Value | None = None, axes: Value | None = None) -> Value:
    given = node.dims(pads, "pads")
    over = [node.axis(axis, x.rank) for axis in node.static_ints(axes, "axes")] if axes is not None else range(x.rank)
    if len(given) != 2 * len(over):
        raise node.invalid(f"{len(given)} pads for {len(over)} axes")
    begins: list[Dim] = [0] * x.rank
    ends: list[Dim] = [0] * x.rank
    for i, axis in enumerate(over):
        begins[axis], ends[axis] = given[i], given[i + len(over)]
    fill = node.scalar(value, "constant_value") if value is not None else 0
    return _pad(node, x, begins, ends, fill)


@operator("Pad")
def Pad_2(node: OnnxNode, x: Value) -> Value:
    pads = node.integers("pads")
    if len(pads) != 2 * x.rank:
        raise node.invalid(f"{len(pads)} pads for a tensor of rank {x.rank}")
    return _pad(node, x, pads[: x.rank], pads[x.rank :], node.number("value", 0.0))


def _pad(node: OnnxNode, x: Value, begins: Sequence[Dim], ends: Sequence[Dim], fill: float) -> Value:
    mode = ops.PadMode(node.choice("mode", "constant", "reflect", "edge", "wrap"))
    fixed = [(b, e) for b, e in zip(begins, ends, strict=True) if isinstance(b, int) and isinstance(e, int)]
    if len(fixed) == x.rank:
        if not any(b or e for b, e in fixed):
            return x
        if mode is not ops.PadMode.CONSTANT:
            fill = 0
        return node.add(ops.Pad(tuple(fixed), mode, fill if x.dtype.is_float else int(fill)), x)
    if mode is not ops.PadMode.CONSTANT:
        raise node.unsupported(f"{mode.value} padding by sizes that depend on the inputs' shapes")
    result = x
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        parts = [result]
        for amount, before in ((begin, True), (end, False)):
            if amount == 0:
                continue
            if isinstance(amount, int) and amount < 0:
                raise node.unsupported("cropping and padding by symbolic sizes at once")
            shape = [amount if i == axis else dim for i, dim in enumerate(result.shape)]
            filled = node.expand(node.constant([fill] * 1, x.dtype), shape)
            parts = [filled, *parts] if before else [*parts, filled]
        result = concat(node, parts, axis)
    return result


@operator("CenterCropPad")
def CenterCropPad(node: OnnxNode, x: Value, shape: Value) -> Value:
    wanted = node.dims(shape, "a target shape")
    axes = [node.axis(axis, x.rank) for axis in node.integers("axes", range(x.rank))]
    if len(wanted) != len(axes):
        raise node.invalid(f"{len(wanted)} sizes for {len(axes)} axes")
    result = x
    for axis, size in zip(axes, wanted, strict=True):
        present = x.shape[axis]
        if not isinstance(size, int) or not isinstance(present, int):
            raise node.unsupported(f"cropping or padding {present} elements to {size}")
        if size < present:
            result = take(node, result, axis, floordiv(present - size, 2), size)
        elif size > present:
            before = (size - present) // 2
            pads = [(before, size - present - before) if i == axis else (0, 0) for i in range(x.rank)]
            result = node.add(ops.Pad(tuple(pads)), result)
    return result


def drop_axis(node: OnnxNode, x: Value, axis: int, position: Dim) -> Value:
    """The elements at `position` of an axis, without that axis."""
    part = take(node, x, axis, position, 1)
    return node.reshape(part, [dim for i, dim in enumerate(part.shape) if i != axis])


def last(size: Dim, index: Dim) -> Dim:
    """`index`, counted from the end where it is negative."""
    return size + index if at_least(-index, 1) else index
