"""Convolutions. The bias is an input of the epilogue, of shape [o, 1, …]."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

from engine.frontend.formula import Term
from engine.frontend.onnx_node import OnnxNode, compute_dtype, store
from engine.frontend.operators.elementwise import same_dtype
from engine.frontend.registry import operator
from engine.ir import expr as ex
from engine.ir import ops
from engine.ir.dim import Dim, ceildiv, floordiv, maximum
from engine.ir.graph import Value

Pads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Window:
    """How a kernel moves over the spatial axes."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: Pads


def window(node: OnnxNode, x: Value, kernel: Sequence[int]) -> Window:
    """strides, dilations and pads of a convolution or pool, with `auto_pad` resolved to numbers."""
    axes = x.rank - 2
    if axes < 1 or len(kernel) != axes:
        raise node.invalid(f"a kernel of {len(kernel)} axes for an input of rank {x.rank}")
    strides = _per_axis(node, "strides", axes)
    dilations = _per_axis(node, "dilations", axes)
    if any(k < 1 for k in kernel):
        raise node.invalid(f"kernel of size {list(kernel)}")
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode = node.choice("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    if mode == "VALID":
        pads: Pads = ((0, 0),) * axes
    elif mode == "NOTSET":
        pads = explicit_pads(node, axes)
    else:
        pads = tuple(
            _same(node, size, extent, stride, mode == "SAME_UPPER")
            for size, extent, stride in zip(x.shape[2:], extents, strides, strict=True)
        )
    return Window(tuple(kernel), strides, dilations, pads)


def _per_axis(node: OnnxNode, name: str, axes: int) -> tuple[int, ...]:
    values = node.integers(name, (1,) * axes)
    if len(values) != axes or any(value < 1 for value in values):
        raise node.invalid(f"{name} = {list(values)} for {axes} spatial axes")
    return values


def explicit_pads(node: OnnxNode, axes: int) -> Pads:
    pads = node.integers("pads", (0,) * 2 * axes)
    if len(pads) != 2 * axes:
        raise node.invalid(f"pads = {list(pads)} for {axes} spatial axes")
    return tuple(zip(pads[:axes], pads[axes:], strict=True))


def same_by_hand(node: OnnxNode, x: Value, kernel: Sequence[int], fill: float) -> tuple[Value, OnnxNode]:
    """`x` padded for a SAME `auto_pad` that depends on sizes of `x` that are not known (as in detection models from
    TensorFlow), and the node without its `auto_pad`.

    The padding is at most extent − 1: that much is added, and a slice with symbolic bounds leaves the part it takes.
    """
    mode = node.choice("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    strides, dilations = (_per_axis(node, name, x.rank - 2) for name in ("strides", "dilations"))
    known = all(isinstance(size, int) or stride == 1 for size, stride in zip(x.shape[2:], strides, strict=True))
    if not mode.startswith("SAME") or known or len(kernel) != x.rank - 2:
        return x, node
    pads, sizes = [(0, 0), (0, 0)], list(x.shape[:2])
    starts: list[Dim] = [0, 0]
    for size, k, dilation, stride in zip(x.shape[2:], kernel, dilations, strides, strict=True):
        most = (k - 1) * dilation
        total = maximum((ceildiv(size, stride) - 1) * stride + most + 1 - size, 0)
        small, large = floordiv(total, 2), total - floordiv(total, 2)
        pads.append((most - most // 2, most - most // 2))
        starts.append(pads[-1][0] - (small if mode == "SAME_UPPER" else large))
        sizes.append(size + total)
    padded = node.add(ops.Pad(tuple(pads), ops.PadMode.CONSTANT, fill), x)
    bare = copy(node)
    bare.attributes = {name: value for name, value in node.attributes.items() if name not in ("auto_pad", "pads")}
    return node.add(ops.Slice(tuple(starts), tuple(sizes), (1,) * x.rank), padded), bare


def _same(node: OnnxNode, size: Dim, extent: int, stride: int, upper: bool) -> tuple[int, int]:
    total = extent - 1 if stride == 1 else (ceildiv(size, stride) - 1) * stride + extent - size
    if not isinstance(total, int):
        raise node.unsupported(f"auto_pad with stride {stride} along an axis of unknown size ({size})")
    total = max(total, 0)
    small, large = total // 2, total - total // 2
    return (small, large) if upper else (large, small)


def kernel_of(node: OnnxNode, w: Value) -> tuple[int, ...]:
    """The kernel size, from the weight's shape; `kernel_shape` must agree."""
    kernel = w.shape[2:]
    if w.rank < 3 or not all(isinstance(k, int) for k in kernel):
        raise node.unsupported(f"a weight of shape [{', '.join(map(str, w.shape))}]")
    sizes = tuple(int(k) for k in kernel if isinstance(k, int))
    if node.has("kernel_shape") and node.integers("kernel_shape") != sizes:
        raise node.invalid(f"kernel_shape {list(node.integers('kernel_shape'))} but the weight is {list(w.shape)}")
    return sizes


def with_bias(node: OnnxNode, op: ops.Conv, x: Value, w: Value, bias: Value | None) -> Value:
    """The convolution with the bias in its epilogue."""
    if bias is None:
        return node.add(op, x, w)
    wide = compute_dtype(x.dtype)
    total = Term(ex.Acc(wide)) + Term(ex.Arg(2, bias.dtype)).cast(wide)
    op = ops.Conv(
        op.strides, op.pads, op.dilations, op.groups, op.transposed, op.output_padding, (total.cast(x.dtype).expr,)
    )
    return node.add(op, x, w, node.reshape(bias, (bias.shape[0], *(1,) * (x.rank - 2))))


def _check(node: OnnxNode, x: Value, w: Value, bias: Value | None, channels: Dim) -> int:
    """The number of groups, once the operands fit each other."""
    same_dtype(node, x, w, *([bias] if bias is not None else []))
    groups = node.integer("group", 1)
    if x.rank != w.rank or x.rank < 3:
        raise node.invalid(f"input of rank {x.rank}, weight of rank {w.rank}")
    if groups < 1 or (isinstance(w.shape[0], int) and w.shape[0] % groups):
        raise node.invalid(f"{groups} groups for a weight of shape {list(w.shape)}")
    if bias is not None and (bias.rank != 1 or bias.shape[0] != channels):
        raise node.invalid(f"bias of shape {list(bias.shape)} for {channels} channels")
    return groups


@operator("Conv")
def Conv(node: OnnxNode, x: Value, w: Value, bias: Value | None = None) -> Value:
    groups = _check(node, x, w, bias, w.shape[0] if w.rank else 0)
    x, node = same_by_hand(node, x, kernel_of(node, w), 0.0)
    moves = window(node, x, kernel_of(node, w))
    op = ops.Conv(moves.strides, moves.pads, moves.dilations, groups, stores=store(x.dtype))
    return with_bias(node, op, x, w, bias)


@operator("ConvTranspose")
def ConvTranspose(node: OnnxNode, x: Value, w: Value, bias: Value | None = None) -> Value:
    groups = _check(node, x, w, bias, w.shape[1] * node.integer("group", 1) if w.rank > 1 else 0)
    kernel = kernel_of(node, w)
    axes = len(kernel)
    strides, dilations = _per_axis(node, "strides", axes), _per_axis(node, "dilations", axes)
    extra = node.integers("output_padding", (0,) * axes)
    if len(extra) != axes:
        raise node.invalid(f"output_padding = {list(extra)} for {axes} spatial axes")
    mode = node.choice("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
    targets: Sequence[Dim] | None = None
    if node.has("output_shape"):
        targets = node.integers("output_shape")[-axes:]
    elif mode.startswith("SAME"):
        targets = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    if targets is None:
        pads: Pads = ((0, 0),) * axes if mode == "VALID" else explicit_pads(node, axes)
    else:
        # The padding that gives the output size asked for; where that is too large, the output grows instead.
        found = []
        grown = []
        for i, target in enumerate(targets):
            total = (x.shape[i + 2] - 1) * strides[i] + extra[i] + (kernel[i] - 1) * dilations[i] + 1 - target
            if not isinstance(total, int):
                raise node.unsupported(f"an output size along an axis of unknown size ({x.shape[i + 2]})")
            small, large = max(total, 0) // 2, max(total, 0) - max(total, 0) // 2
            found.append((small, large) if mode == "SAME_UPPER" else (large, small))
            grown.append(extra[i] - min(total, 0))
        pads, extra = tuple(found), tuple(grown)
    op = ops.Conv(strides, pads, dilations, groups, True, extra if any(extra) else (), store(x.dtype))
    return with_bias(node, op, x, w, bias)
